"""One optimizer step, one gather and one rebuild, the same under plain, DDP, ZeRO-1, 2 and 3.

The engine knows parameters by name; it does not know what a rank is.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn

from tsqlora_scale.config.schema import TrainConfig
from tsqlora_scale.engine import zero
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.numerics import clip_gradients, fix_summation_order
from tsqlora_scale.engine.train_state import ParamState, TrainState


@dataclass
class _DdpKwargs(DistributedDataParallelKwargs):
    """Accelerate's, with the argument of DDP that it does not name: whether all of the model is sent to all ranks."""

    init_sync: bool = True


class Engine:
    """A model under training, wrapped by whatever the launcher asked for.

    Args:
        accelerator: from :func:`tsqlora_scale.engine.start.start_accelerator`.
        module: the model, trainable parameters in float32 with ``requires_grad``.
        train: learning-rate-free optimizer settings are read from here (betas, eps, weight decay, clipping).
        micro_batch_size: samples per rank and backward pass.
        before_prepare: called with the module before every ``prepare``: where hooks are attached that must sit
            inside the engine's own.
        state: moments and step count to start from (a resumed run); values must already be in ``module``.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        *,
        train: TrainConfig,
        micro_batch_size: int,
        before_prepare: Callable[[nn.Module], None] | None = None,
        state: TrainState | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.world = World.current(accelerator.device)
        self._train = train
        self._micro_batch_size = micro_batch_size
        self._before_prepare = before_prepare
        if self.name != "zero3":
            fix_summation_order(module)
        # Rebuilding collects garbage, which takes a time that grows with the objects that are looked at. Those of
        # libraries and model, half a million, stay: looking at them twice took 0.5 s of an event's 0.6 s.
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        self._prepare(module, state or TrainState(), sends_base=True)

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed drives the optimizer."""
        return bool(self.accelerator.distributed_type == DistributedType.DEEPSPEED)

    @property
    def name(self) -> str:
        """What the engine really is: ``plain``, ``ddp``, ``zero2`` or ``zero3``."""
        if self.is_deepspeed:
            return f"zero{self.accelerator.state.deepspeed_plugin.zero_stage}"
        return "plain" if self.world.size == 1 else "ddp"

    @property
    def loss_scale(self) -> float:
        """The factor that undoes the engine's averaging over ranks and micro-batches.

        A step's loss is normalised over the whole step; each micro-batch contributes a plain sum.
        """
        return float(self.world.size * self.accelerator.gradient_accumulation_steps)

    @property
    def gradient_scale(self) -> float:
        """How much larger the gradients inside a backward pass are than those of the step's loss.

        Accelerate and DeepSpeed divide by the accumulation before the backward pass; averaging over ranks and a
        loss scaler's factor come after it.
        """
        scaler = self.accelerator.scaler
        if self.is_deepspeed:
            scale = float(self._wrapped.optimizer.loss_scale)
        else:
            scale = scaler.get_scale() if scaler is not None else 1.0
        return self.world.size * scale

    @property
    def overflow_is_normal(self) -> bool:
        """Whether a gradient that is not finite may be the work of a loss scaler still looking for its scale (fp16)."""
        if self.is_deepspeed:
            return float(self._wrapped.optimizer.loss_scale) > 1
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    def scaler_state(self) -> dict[str, Any] | None:
        """State of fp16's loss scaler: its scale and what moves it. None without one.

        DeepSpeed's own scaler starts anew after every rebuild and resume.
        """
        scaler = self.accelerator.scaler
        return None if scaler is None else scaler.state_dict()

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Continue from a :meth:`scaler_state`, also where there was or is no scaler."""
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(state)

    @property
    def module(self) -> nn.Module:
        """The unwrapped model. Score and evaluate through it, never through the engine's wrapper: under ZeRO-3 a
        foreign backward through the wrapper changes the next step without a word."""
        module: nn.Module = self._wrapped.module if self._is_wrapped else self._wrapped
        return module

    def forward(self, **inputs: torch.Tensor) -> Any:
        """The training forward."""
        return self._wrapped(**inputs)

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around one micro-batch's forward and backward: no gradient exchange before the last of the step."""
        with self.accelerator.accumulate(self._wrapped):
            yield

    def backward(self, loss: torch.Tensor, lr: float) -> float | None:
        """Backward of one micro-batch's share of the step's loss; on the last one, the optimizer step.

        The optimizer does not step, and nothing it keeps changes, where the norm is not finite: it is that of the
        exchanged gradient, so all ranks decide alike.

        Args:
            loss: this micro-batch's part of the globally normalised loss (not yet scaled).
            lr: learning rate of the step.

        Returns:
            The gradient's 2-norm before clipping on the last micro-batch of a step, else None.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self.accelerator.backward(loss * self.loss_scale)
        if not self.accelerator.sync_gradients:
            return None
        if self.is_deepspeed:  # backward() has stepped already
            return float(self.accelerator.deepspeed_engine_wrapped.get_global_grad_norm() or 0.0)
        self.accelerator.unscale_gradients(self._optimizer)
        params = self._trainable()
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if norm.isfinite():
            if self._train.max_grad_norm is not None:
                clip_gradients(params, norm, self._train.max_grad_norm)
            self._optimizer.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # which step() would do
        self._optimizer.zero_grad()
        return float(norm)

    def gather(self) -> TrainState:
        """Every trainable parameter and its moments, whole, on every rank. A collective."""
        if self.is_deepspeed:
            return zero.gather(self._wrapped)
        inner = self._optimizer.optimizer.state
        state = TrainState()
        for name, param in sorted(self.module.named_parameters()):
            if not param.requires_grad:
                continue
            entry = ParamState.fresh(param.detach().float().cpu().clone())
            if param in inner:
                entry.exp_avg = inner[param]["exp_avg"].detach().cpu().clone()
                entry.exp_avg_sq = inner[param]["exp_avg_sq"].detach().cpu().clone()
                state.optimizer_steps = int(inner[param]["step"])
            state.params[name] = entry
        return state

    def rebuild(self, change: Callable[[nn.Module, TrainState], TrainState]) -> None:
        """Gather, take the engine down, let ``change`` alter the module, and prepare again. A collective.

        The frozen base stays where it is: no rank sends it, under ZeRO-3 nothing of it is gathered or sharded anew.

        Args:
            change: alters the module in place and returns the state of its trainable parameters, by name; it runs
                on every rank and must do the same on each.
        """
        state = self.gather()
        module = self.module
        self._take_down()
        state = change(module, state)
        if self.name == "ddp":
            self._take_from_main(module, state)
        self._prepare(module, state, sends_base=False)

    def close(self) -> None:
        """Take the engine down; the module stays. A collective."""
        self._take_down()
        gc.unfreeze()

    def _take_down(self) -> None:
        if self.is_deepspeed:
            zero.release(self.accelerator, self._wrapped, self._optimizer)
        else:
            self.accelerator.free_memory(self._wrapped, self._optimizer)
        del self._wrapped, self._optimizer
        gc.collect()

    def _take_from_main(self, module: nn.Module, state: TrainState) -> None:
        """Trainable parameters and moments of rank 0: what every rank computed for itself may differ in the last bits
        where machines do, and DDP never looks again."""
        params = dict(module.named_parameters())
        entries = [entry for _, entry in sorted(state.params.items())]
        tensors = [tensor for e in entries for tensor in (e.value, e.exp_avg, e.exp_avg_sq)]
        flat = self.world.broadcast_tensor(torch.cat([t.flatten() for t in tensors]))
        for tensor, received in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(received.view_as(tensor))
        with torch.no_grad():
            for name, entry in state.params.items():
                params[name].copy_(entry.value)

    def frozen_parameters(self) -> dict[str, Any]:
        """The frozen base: how many parameters there are (``all``), how many of them this rank holds only a part of
        (``sharded``), and the ``bytes`` of what it holds by type, between uses."""
        frozen = [p for p in self.module.parameters() if not p.requires_grad]
        held: dict[str, int] = {}
        for param in frozen:
            tensor = zero.held_part(param)
            kind = str(tensor.dtype).removeprefix("torch.")
            held[kind] = held.get(kind, 0) + tensor.numel() * tensor.element_size()
        return {"sharded": sum(zero.is_sharded(p) for p in frozen), "all": len(frozen), "bytes": held}

    def _trainable(self) -> list[nn.Parameter]:
        return [p for _, p in sorted(self.module.named_parameters()) if p.requires_grad]

    def _prepare(self, module: nn.Module, state: TrainState, *, sends_base: bool) -> None:
        if self._before_prepare is not None:
            self._before_prepare(module)
        params = [p for _, p in sorted(module.named_parameters()) if p.requires_grad]
        optimizer = torch.optim.AdamW(
            params,
            lr=self._train.lr,
            betas=(self._train.betas[0], self._train.betas[1]),
            eps=self._train.eps,
            weight_decay=self._train.weight_decay,
        )
        if self.is_deepspeed:
            zero.forget_replaced(module)
            zero.configure(
                self.accelerator,
                micro_batch_size=self._micro_batch_size,
                max_grad_norm=self._train.max_grad_norm,
                trainable_numel=sum(p.numel() for p in params),
            )
        else:
            _restore_moments(optimizer, module, state)
        self._is_wrapped = self.is_deepspeed or self.world.size > 1
        self.accelerator.ddp_handler = _DdpKwargs(init_sync=sends_base)
        with zero.preparing(module, sends_base=sends_base) if self.is_deepspeed else nullcontext():
            self._wrapped, self._optimizer = self.accelerator.prepare(module, optimizer)
        if self.is_deepspeed:
            zero.clip_by_rounded_norm(self._wrapped)
            zero.restore_moments(self._wrapped, state)
        self._wrapped.train()


def _restore_moments(optimizer: torch.optim.Optimizer, module: nn.Module, state: TrainState) -> None:
    if not state.optimizer_steps:
        return
    for name, param in module.named_parameters():
        if param.requires_grad:
            entry = state.params[name]
            optimizer.state[param] = {
                "step": torch.tensor(float(state.optimizer_steps)),
                "exp_avg": entry.exp_avg.to(param.device, copy=True),
                "exp_avg_sq": entry.exp_avg_sq.to(param.device, copy=True),
            }


def generator_for(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator that depends on the seed and the purpose alone, the same on every rank."""
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
