"""The step that Adam would take for one sample alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tsqlora_scale.engine.train_state import TrainState


class AdamUpdate:
    """Gamma of LESS (2402.04333, section 3.1): what Adam makes of a sample's gradient, after the steps that it has
    made, up to the learning rate; without clipping, which is of a step's gradient, and without weight decay.

    With ``g`` the gradient, ``m`` and ``v`` the moments after ``t`` steps::

        (b1 m + (1 - b1) g) / (1 - b1^(t+1)) / (sqrt((b2 v + (1 - b2) g^2) / (1 - b2^(t+1))) + eps)

    It is no linear function of the gradient, so no sum over calls or factors of it may be taken: each parameter's
    whole gradient is needed.

    Args:
        state: the moments, and how many steps they have behind them, ``t``.
        betas, eps: the optimizer's.
        scales: of the parameters' learning rates, by name; all others' are 1.
    """

    def __init__(
        self,
        state: TrainState,
        *,
        betas: Sequence[float],
        eps: float,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        self._moments = {name: (entry.exp_avg, entry.exp_avg_sq) for name, entry in state.params.items()}
        self._scales = dict(scales or {})
        self._betas = float(betas[0]), float(betas[1])
        first, second = (beta ** (state.optimizer_steps + 1) for beta in self._betas)
        self._rests = 1 - first, 1 - second
        self._eps = eps

    def __call__(self, name: str, gradient: Tensor) -> Tensor:
        """Of gradients (B, ...) of the parameter ``name``, float32 of that shape. A step goes against it."""
        (first, second), (rest, rest_of_square) = self._betas, self._rests
        mean, square = self._on(name, gradient.device)
        divisor = gradient.square().mul_(1 - second).add_(square * second).div_(rest_of_square).sqrt_().add_(self._eps)
        step = torch.add(mean * first, gradient, alpha=1 - first).div_(rest).div_(divisor)
        return step.mul_(self._scales.get(name, 1.0))

    def _on(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """A parameter's moments, which stay on the device that they are first asked for."""
        mean, square = self._moments[name]
        found = self._moments[name] = mean.to(device), square.to(device)
        return found
