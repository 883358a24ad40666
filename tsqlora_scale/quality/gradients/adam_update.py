"""The step that Adam would take for one sample alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Adam's means of one parameter's gradient and of its square, of the parameter's shape, float32."""

    mean: Tensor
    square: Tensor


class AdamUpdate:
    """Gamma of LESS (2402.04333, section 3.1): what Adam makes of a sample's gradient, after the steps that it has
    made, up to the learning rate; without clipping, which is of a step's gradient, and without weight decay.

    With ``g`` the gradient, ``m`` and ``v`` the moments after ``t`` steps::

        (b1 m + (1 - b1) g) / (1 - b1^(t+1)) / (sqrt((b2 v + (1 - b2) g^2) / (1 - b2^(t+1))) + eps)

    It is no linear function of the gradient, so no sum over calls or factors of it may be taken: each parameter's
    whole gradient is needed.

    Args:
        moments: of the parameters, by name.
        steps: that they have behind them, ``t``.
        betas, eps: the optimizer's.
        scales: of the parameters' learning rates, by name; all others' are 1.
    """

    def __init__(
        self,
        moments: Mapping[str, Moments],
        *,
        steps: int,
        betas: Sequence[float],
        eps: float,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        self._moments = dict(moments)
        self._scales = dict(scales or {})
        self._betas = float(betas[0]), float(betas[1])
        self._rests = 1 - self._betas[0] ** (steps + 1), 1 - self._betas[1] ** (steps + 1)
        self._eps = eps

    def __call__(self, name: str, gradient: Tensor) -> Tensor:
        """Of gradients (B, ...) of the parameter ``name``, float32 of that shape. A step goes against it."""
        (first, second), (rest, rest_of_square) = self._betas, self._rests
        mean, square = self._on(name, gradient.device)
        divisor = gradient.square().mul_(1 - second).add_(square * second).div_(rest_of_square).sqrt_().add_(self._eps)
        step = torch.add(mean * first, gradient, alpha=1 - first).div_(rest).div_(divisor)
        return step.mul_(self._scales.get(name, 1.0))

    def _on(self, name: str, device: torch.device) -> Moments:
        found = self._moments[name]
        if found.mean.device != device:
            found = self._moments[name] = Moments(found.mean.to(device), found.square.to(device))
        return found
