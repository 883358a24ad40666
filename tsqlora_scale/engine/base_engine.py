"""What the engines share: how they start, rebuild and end."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from tsqlora_scale.config.schema import TrainConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.numerics import fix_summation_order
from tsqlora_scale.engine.replicas import Holdings, compare
from tsqlora_scale.engine.sharded import held_part, is_sharded, read_parameter, write_parameter
from tsqlora_scale.engine.train_state import TrainState

#: What a group of the optimizer notes of its own learning rate.
LR_SCALE = "lr_scale"


class BaseEngine(ABC):
    """An :class:`~tsqlora_scale.engine.engine.Engine` but for what the kinds do each in their own way."""

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        *,
        train: TrainConfig,
        micro_batch_size: int,
        before_prepare: Callable[[nn.Module], None] | None,
        state: TrainState,
        lr_scales: Callable[[nn.Module], Mapping[str, float]] | None = None,
    ) -> None:
        self.accelerator = accelerator
        self._lr_scales = lr_scales
        self.world = World.current(accelerator.device)
        self._train = train
        self._micro_batch_size = micro_batch_size
        self._before_prepare = before_prepare
        if self.name != "zero3" and accelerator.device.type == "cpu":
            fix_summation_order(module)
        # Rebuilding collects garbage, which takes a time that grows with the objects that are looked at. Those of
        # libraries and model, half a million, stay: looking at them twice took 0.5 s of an event's 0.6 s.
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        # Ranks have read the base for as long as their disks take. DeepSpeed sends it through a group of its own, which
        # waits for ten minutes whatever run.timeout_minutes says; so they meet here, where that holds.
        self.world.barrier()
        self._prepare(module, state, sends_base=True)
        if state.params:
            self._check_restored(state, when="after the checkpoint was read")

    @property
    @abstractmethod
    def name(self) -> str:
        """What the engine really is."""

    @abstractmethod
    def _gather(self) -> TrainState:
        """Every parameter of :attr:`_named` and its moments, whole, on every rank. A collective."""

    @abstractmethod
    def _unlike(self, state: TrainState) -> list[str]:
        """What this rank holds, shards included, and ``state`` has otherwise: ``exp_avg of NAME``."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The unwrapped model."""

    @abstractmethod
    def _release(self) -> None:
        """Let go of the wrapped model and the optimizer."""

    @abstractmethod
    def _wrap(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, *, sends_base: bool
    ) -> tuple[Any, Any]:
        """The wrapped model and the optimizer, with the moments of ``state``."""

    @property
    def _fuses(self) -> bool:
        """Whether Adam's step is one kernel for many tensors."""
        return False

    def gather(self) -> TrainState:
        """See :class:`~tsqlora_scale.engine.engine.Engine`."""
        state = self._gather()
        faults = self._strays() + (self._unlike(state) if self._assembles else [])
        self._compare(state, faults, when="taken together")
        return state

    @property
    def _assembles(self) -> bool:
        """Whether :meth:`_gather` puts parts of several ranks together, so that all ranks see the same in any case."""
        return False

    def _strays(self) -> list[str]:
        """What trains in the module and not in the optimizer, or the other way round."""
        known = {id(param) for param in self._named.values()}
        training = {name: param for name, param in self.module.named_parameters() if param.requires_grad}
        found = [
            f"{name} was made after the engine started" for name, param in training.items() if id(param) not in known
        ]
        return found + [f"{name} is gone or frozen" for name in self._named if name not in training]

    def _check_restored(self, state: TrainState, *, when: str) -> None:
        """Whether all ranks were given the same, and hold it. A collective."""
        self._compare(state, self._unlike(state), when=when)

    def _compare(self, state: TrainState, faults: list[str], *, when: str) -> None:
        alone = self.world.size == 1  # with nobody to compare with
        compare(self.world, Holdings({}, faults) if alone else Holdings.from_state(state, faults), when=when)

    @property
    def distributed_type(self) -> str:
        """Accelerate's name of the engine."""
        return str(self.accelerator.distributed_type.value)

    @property
    def loss_scale(self) -> float:
        """The factor that undoes the engine's averaging over ranks and micro-batches.

        A step's loss is normalised over the whole step; each micro-batch contributes a plain sum.
        """
        return float(self.world.size * self.accelerator.gradient_accumulation_steps)

    def forward(self, **inputs: torch.Tensor) -> Any:
        """The training forward."""
        return self._wrapped(**inputs)

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around one micro-batch's forward and backward: no gradient exchange before the last of the step."""
        with self.accelerator.accumulate(self._wrapped):
            yield

    def scaler_state(self) -> dict[str, Any] | None:
        """State of fp16's loss scaler. None without one."""
        scaler = self.accelerator.scaler
        return None if scaler is None else scaler.state_dict()

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Continue from a :meth:`scaler_state`, also where there was or is no scaler."""
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(state)

    def rebuild(self, change: Callable[[nn.Module, TrainState], TrainState]) -> None:
        """See :class:`~tsqlora_scale.engine.engine.Engine`."""
        state = self.gather()
        module = self.module
        self._take_down()
        state = self._agreed(module, change(module, state))
        self._prepare(module, state, sends_base=False)
        self._check_restored(state, when="after the ranks of layers have changed")

    def _agreed(self, module: nn.Module, state: TrainState) -> TrainState:
        """``state`` and the module's trainable parameters, the same on every rank, where the engine sees to it."""
        return state

    @contextmanager
    def holding(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """See :class:`~tsqlora_scale.engine.engine.Engine`.

        After an error the values stay as they are: the run is over, and ranks without one would wait in a collective.
        """
        self._settle()
        own = {name: read_parameter(self._named[name]) for name in sorted(values)}
        for name in own:
            write_parameter(self._named[name], values[name])
        yield
        self._settle()
        for name, value in own.items():
            write_parameter(self._named[name], value)

    def _settle(self) -> None:  # noqa: B027
        """Let go of what passes have left gathered."""

    def close(self) -> None:
        """Take the engine down; the module stays. A collective."""
        self._take_down()
        gc.unfreeze()

    def _take_down(self) -> None:
        self._release()
        del self._wrapped, self._optimizer, self._trained, self._named
        gc.collect()

    def _set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get(LR_SCALE, 1.0)

    def frozen_parameters(self) -> dict[str, Any]:
        """See :class:`~tsqlora_scale.engine.engine.Engine`."""
        frozen = [p for p in self.module.parameters() if not p.requires_grad]
        held: dict[str, int] = {}
        for param in frozen:
            tensor = held_part(param)
            kind = str(tensor.dtype).removeprefix("torch.")
            held[kind] = held.get(kind, 0) + tensor.numel() * tensor.element_size()
        return {"sharded": sum(is_sharded(p) for p in frozen), "all": len(frozen), "bytes": held}

    def _prepare(self, module: nn.Module, state: TrainState, *, sends_base: bool) -> None:
        if self._before_prepare is not None:
            self._before_prepare(module)
        #: What trains, in the order of names, until the next rebuild: looking for it takes milliseconds.
        self._named = {name: param for name, param in sorted(module.named_parameters()) if param.requires_grad}
        self._trained = list(self._named.values())
        scales = None if self._lr_scales is None else self._lr_scales(module)
        params = self._trained if scales is None else lr_groups(self._named, scales)
        optimizer = adamw(params, self._train, fused=self._fuses)
        self._wrapped, self._optimizer = self._wrap(module, optimizer, state, sends_base=sends_base)
        self._wrapped.train()


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, in the order of their names."""
    return [p for _, p in sorted(module.named_parameters()) if p.requires_grad]


def lr_groups(named: Mapping[str, nn.Parameter], scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parameters by what their learning rate is multiplied by, the largest first; an optimizer's groups."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, param in named.items():
        groups.setdefault(scales[name], []).append(param)
    return [{"params": params, LR_SCALE: scale} for scale, params in sorted(groups.items(), reverse=True)]


def adamw(
    params: list[nn.Parameter] | list[dict[str, Any]], train: TrainConfig, *, fused: bool = False
) -> torch.optim.AdamW:
    """The optimizer of a run.

    Args:
        params: that train, or :func:`lr_groups` of them.
        fused: PyTorch's kernel that takes the step of many tensors at once; its last bits are its own. Without it a GPU
            is waited for twice a tensor and step once moments were restored: their step counts then lie on the GPU.
    """
    return torch.optim.AdamW(
        params,
        lr=train.lr,
        betas=(train.betas[0], train.betas[1]),
        eps=train.eps,
        weight_decay=train.weight_decay,
        fused=fused or None,
    )
