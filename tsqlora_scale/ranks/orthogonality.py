"""AdaLoRA's penalty that keeps components apart: gamma times the mean over factors of ||A A^T - I||_F, ||B^T B - I||_F
(2303.10512, Eq. 4; with norms, not their squares, as PEFT has it).

It does not depend on the data, so its gradient is added where autograd puts down that of the loss, in equal parts to
the micro-batches of a step: a factor is whole there under every engine, and clipping, moments and importances see the
sum. Nothing of it is in the losses that a run reports.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import matrix_norm

from tsqlora_scale.model.adapters.lora import ADAPTER, has_factors, lora_layers
from tsqlora_scale.tasks.packing import Packing


class OrthogonalityPenalty:
    """Adds the penalty's gradient. Calls are those of :class:`~tsqlora_scale.step.StepListener`, and :meth:`attach`."""

    def __init__(self, gamma: float, *, batch_size: int) -> None:
        """Of a run of ``batch_size`` samples an optimizer step, over all processes."""
        self._gamma = gamma
        self._batch_size = batch_size
        self._handles: list[Any] = []
        self._loss_scale = 1.0
        #: What a factor's gradient is multiplied by in this micro-batch; 0 outside of a step.
        self._factor = 0.0

    def attach(self, model: nn.Module) -> None:
        """Hook the factors of ``model``, before anyone who is to hear the sum."""
        for handle in self._handles:
            handle.remove()
        layers: list[Any] = [layer for layer in lora_layers(model).values() if has_factors(layer)]
        pairs = [(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight) for layer in layers]
        self._count = 2 * len(pairs)
        self._handles = [
            param.register_hook(partial(self._add, param, side))
            for pair in pairs
            for side, param in zip("AB", pair, strict=True)
        ]

    def start_step(self, step: int, *, loss_scale: float) -> None:
        """See :meth:`.SensitivityTracker.start_step`."""
        self._loss_scale = loss_scale

    def start_micro_batch(self, size: int, position: int, packing: Packing | None = None) -> None:
        """The next backward pass takes a share of the penalty as large as its share of the step's samples."""
        self._factor = self._gamma * self._loss_scale * size / self._batch_size / self._count if self._count else 0.0

    def end_step(self, *, taken: bool) -> None:
        """Backward passes that follow are none of a step."""
        self._factor = 0.0

    @torch.no_grad()
    def _add(self, param: nn.Parameter, side: str, gradient: Tensor) -> Tensor | None:
        if not self._factor:
            return None
        return gradient + (self._factor * distance_gradient(param.detach().float(), side)).to(gradient.dtype)


def distance_gradient(factor: Tensor, side: str) -> Tensor:
    """The gradient of ||A A^T - I||_F, for ``side`` B of ||B^T B - I||_F, of the factor's shape; 0 where that is 0."""
    rows = factor if side == "A" else factor.T
    rest = rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    norm = matrix_norm(rest)
    gradient = 2 * (rest @ rows) / torch.where(norm > 0, norm, 1.0)
    return gradient if side == "A" else gradient.T
