"""FSDP2: the frozen base sharded layer by layer, what trains whole on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.engine import fsdp_internals
from tsqlora_scale.engine.ddp import DdpEngine, restore_moments
from tsqlora_scale.engine.launcher_settings import FsdpSettings
from tsqlora_scale.engine.train_state import TrainState

#: Elements of gradients that are exchanged at once: few exchanges, and little memory beside them.
AT_ONCE = 2**24


class FsdpEngine(DdpEngine):
    """A model whose frozen weights are sharded over the ranks by torch's ``fully_shard``.

    Factors and heads are whole on every rank: they are small, a rank event is then a new optimizer and nothing else,
    and all that is done with them is what DDP does, the exchange of gradients but for its buckets. See
    :class:`~tsqlora_scale.engine.engine.Engine`.
    """

    @property
    def name(self) -> str:
        """``fsdp2``."""
        return "fsdp2"

    @property
    def distributed_type(self) -> str:
        """Accelerate's name of it, which Accelerate gives on a GPU only."""
        return "FSDP"

    @property
    def module(self) -> nn.Module:
        """The model: what shards it are hooks of its layers."""
        module: nn.Module = self._wrapped
        return module

    @property
    def gradient_scale(self) -> float:
        """One: gradients are summed over micro-batches and ranks as they are."""
        return 1.0

    @property
    def overflow_is_normal(self) -> bool:
        """Never: there is no loss scaler, as fp16 is refused."""
        return False

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Around one micro-batch's forward and backward; gradients are exchanged in :meth:`step`."""
        with self.accelerator.accumulate():
            yield

    def forward(self, **inputs: torch.Tensor) -> Any:
        """The training forward.

        Raises:
            UserError: a layer reads the weight of another one without calling it.
        """
        try:
            return self._wrapped(**inputs)
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" not in str(error):
                raise
            raise UserError(
                "a layer of this model reads the weight of another one without a call, and FSDP2 gathers none then; "
                "use DDP or ZeRO-2"
            ) from error

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of one micro-batch's share of the step's loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> float:
        """See :class:`~tsqlora_scale.engine.engine.Engine`."""
        for piece in _pieces(self._trained):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in piece])
            summed = self.world.sum(flat).split([p.numel() for p in piece])
            for param, gradient in zip(piece, summed, strict=True):
                param.grad = gradient.view_as(param)
        return super().step(lr)

    def _release(self) -> None:
        self.accelerator.free_memory(self._optimizer)

    def _wrap(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, *, sends_base: bool
    ) -> tuple[Any, Any]:
        if sends_base:
            fsdp_internals.shard(module, settings=FsdpSettings.of_launcher(), device=self.accelerator.device)
            for param in self._trained:
                param.data.copy_(self.world.broadcast_tensor(param.data))
        restore_moments(optimizer, module, state)
        return module, self.accelerator.prepare_optimizer(optimizer)


def _pieces(params: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in pieces of about :data:`AT_ONCE` elements."""
    piece: list[nn.Parameter] = []
    for param in params:
        piece.append(param)
        if sum(p.numel() for p in piece) >= AT_ONCE:
            yield piece
            piece = []
    if piece:
        yield piece
