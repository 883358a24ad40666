"""DeepSpeed ZeRO-1, 2 and 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tsqlora_scale.engine import zero_internals
from tsqlora_scale.engine.base_engine import BaseEngine, trainable
from tsqlora_scale.engine.train_state import TrainState


class ZeroEngine(BaseEngine):
    """A model whose optimizer state, and with ZeRO-3 whose parameters, are sharded over the ranks.

    See :class:`~tsqlora_scale.engine.engine.Engine`.
    """

    @property
    def name(self) -> str:
        """``zero1``, ``zero2`` or ``zero3``."""
        return f"zero{self.accelerator.state.deepspeed_plugin.zero_stage}"

    @property
    def module(self) -> nn.Module:
        """The unwrapped model."""
        module: nn.Module = self._wrapped.module
        return module

    @property
    def gradient_scale(self) -> float:
        """The number of ranks: there is no loss scaler, as fp16 is refused."""
        return float(self.world.size)

    @property
    def overflow_is_normal(self) -> bool:
        """Never: there is no loss scaler."""
        return False

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of one micro-batch's share of the step's loss.

        Not by :meth:`accelerate.Accelerator.backward`, which steps, too.
        """
        self._wrapped.set_gradient_accumulation_boundary(is_boundary=self.accelerator.sync_gradients)
        self._wrapped.backward(loss * self.loss_scale)

    def step(self, lr: float) -> float:
        """See :class:`~tsqlora_scale.engine.engine.Engine`. Gradients exist between the last backward and this."""
        assert self.accelerator.sync_gradients, "the last micro-batch of a step must be an accumulation boundary"
        self._set_lr(lr)
        self._wrapped.step()
        return float(self._wrapped.get_global_grad_norm() or 0.0)

    def _gather(self) -> TrainState:
        return zero_internals.gather(self._wrapped, self._named)

    @property
    def _assembles(self) -> bool:
        return True

    def _unlike(self, state: TrainState) -> list[str]:
        return zero_internals.unlike(self._named, state)

    def _settle(self) -> None:
        if self.name == "zero3":
            self._wrapped.optimizer._partition_all_parameters()

    def _release(self) -> None:
        zero_internals.release(self.accelerator, self._wrapped, self._optimizer)

    def _wrap(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, *, sends_base: bool
    ) -> tuple[Any, Any]:
        zero_internals.forget_replaced(module)
        zero_internals.configure(
            self.accelerator,
            micro_batch_size=self._micro_batch_size,
            max_grad_norm=self._train.max_grad_norm,
            trainable_numel=sum(p.numel() for p in trainable(module)),
        )
        with zero_internals.preparing(module, sends_base=sends_base):
            wrapped, prepared = self.accelerator.prepare(module, optimizer)
        zero_internals.clip_by_rounded_norm(wrapped)
        zero_internals.restore_moments(wrapped, state)
        return wrapped, prepared
