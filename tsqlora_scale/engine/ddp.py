"""One process, and DDP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tsqlora_scale.engine.base_engine import BaseEngine
from tsqlora_scale.engine.numerics import clip_gradients
from tsqlora_scale.engine.train_state import ParamState, TrainState


@dataclass
class _DdpKwargs(DistributedDataParallelKwargs):
    """Accelerate's, with the argument of DDP that it does not name: whether all of the model is sent to all ranks."""

    init_sync: bool = True


class DdpEngine(BaseEngine):
    """A model on one process, or the same model on several. See :class:`~tsqlora_scale.engine.engine.Engine`."""

    @property
    def name(self) -> str:
        """``plain`` or ``ddp``."""
        return "plain" if self.world.size == 1 else "ddp"

    @property
    def module(self) -> nn.Module:
        """The unwrapped model."""
        wrapped = self._wrapped  # by DDP on one rank, too, if a launcher has started it alone
        module: nn.Module = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
        return module

    @property
    def gradient_scale(self) -> float:
        """The number of ranks, times the loss scaler's factor."""
        scaler = self.accelerator.scaler
        return self.world.size * (scaler.get_scale() if scaler is not None else 1.0)

    @property
    def overflow_is_normal(self) -> bool:
        """Whether there is a loss scaler that scales."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    @property
    def _fuses(self) -> bool:
        """On a GPU: DeepSpeed has few and large tensors, and DDP on a CPU its pinned trajectories."""
        return bool(self.accelerator.device.type == "cuda")

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of one micro-batch's share of the step's loss."""
        self.accelerator.backward(loss * self.loss_scale)

    def step(self, lr: float) -> float:
        """See :class:`~tsqlora_scale.engine.engine.Engine`."""
        assert self.accelerator.sync_gradients, "the last micro-batch of a step must be an accumulation boundary"
        self._set_lr(lr)
        for param in self._trained:
            if param.grad is None:  # of an expert that no text was sent to: Adam would not count the step for it alone
                param.grad = torch.zeros_like(param)
        self.accelerator.unscale_gradients(self._optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        if self._train.max_grad_norm is not None:  # of a gradient that is not finite, too: nothing uses that one
            clip_gradients(self._trained, norm, self._train.max_grad_norm)
        found = float(norm)  # the step's one wait for a GPU
        if math.isfinite(found):
            self._optimizer.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # which step() would do
        self._optimizer.zero_grad()
        return found

    def _gather(self) -> TrainState:
        inner = self._optimizer.optimizer.state
        state, steps = TrainState(), torch.zeros(())
        for name, param in self._named.items():
            entry = ParamState.fresh(param.detach().to("cpu", torch.float32, copy=True))
            if param in inner:
                entry.exp_avg = inner[param]["exp_avg"].detach().to("cpu", copy=True)
                entry.exp_avg_sq = inner[param]["exp_avg_sq"].detach().to("cpu", copy=True)
                steps = inner[param]["step"]
            state.params[name] = entry
        state.optimizer_steps = int(steps)
        return state

    def _unlike(self, state: TrainState) -> list[str]:
        own = self._gather()
        found = [] if own.optimizer_steps == state.optimizer_steps else ["optimizer_steps"]
        for name, entry in own.params.items():
            other = state.params.get(name)
            parts = ("value", "exp_avg", "exp_avg_sq") if state.optimizer_steps else ("value",)
            found += [
                f"{part} of {name}"
                for part in parts
                if other is None or not torch.equal(getattr(entry, part), getattr(other, part))
            ]
        return found

    def _agreed(self, module: nn.Module, state: TrainState) -> TrainState:
        """Trainable parameters and moments of rank 0: what every rank computed for itself may differ in the last bits
        where machines do, and DDP never looks again."""
        if self.world.size == 1:
            return state
        params = dict(module.named_parameters())
        entries = [entry for _, entry in sorted(state.params.items())]
        tensors = [tensor for e in entries for tensor in (e.value, e.exp_avg, e.exp_avg_sq)]
        flat = self.world.broadcast_tensor(torch.cat([t.flatten() for t in tensors]))
        for tensor, received in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(received.view_as(tensor))
        with torch.no_grad():
            for name, entry in state.params.items():
                params[name].copy_(entry.value)
        return state

    def _release(self) -> None:
        module = self.module
        self.accelerator.free_memory(self._wrapped, self._optimizer)
        # Accelerate's autocast (fp16) is about the module's forward, and is put about it again by every prepare()
        if "_original_forward" in module.__dict__:
            module.forward = module.__dict__.pop("_original_forward")
            module.__dict__.pop("_is_accelerate_prepared", None)

    def _wrap(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, *, sends_base: bool
    ) -> tuple[Any, Any]:
        restore_moments(optimizer, module, state)
        self.accelerator.ddp_handler = _DdpKwargs(init_sync=sends_base)
        wrapped, prepared = self.accelerator.prepare(module, optimizer)
        return wrapped, prepared


def restore_moments(optimizer: torch.optim.Optimizer, module: nn.Module, state: TrainState) -> None:
    """Give an optimizer of whole parameters the moments and the step count of ``state``."""
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
