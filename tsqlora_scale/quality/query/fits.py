"""Small convex fits in float64: log-linear mixtures of scores, and a logistic regression."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tsqlora_scale.common.random_streams import philox

#: L-BFGS: iterations at most, and the change of the objective at which it ends.
ITERATIONS, TOLERANCE = 200, 1e-9


def minimised(objective: Callable[[Sequence[Tensor]], Tensor], start: Sequence[Tensor]) -> list[Tensor]:
    """Where a smooth convex ``objective`` of some float64 tensors is least, by L-BFGS from ``start``."""
    parameters = [tensor.clone().requires_grad_(True) for tensor in start]
    solver = torch.optim.LBFGS(
        parameters,
        max_iter=ITERATIONS,
        tolerance_grad=1e-8,
        tolerance_change=TOLERANCE,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        with torch.enable_grad():
            value = objective(parameters)
            value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    solver.step(closure)  # type: ignore[no-untyped-call]
    return [parameter.detach() for parameter in parameters]


def log_linear(
    scores: Tensor, y: Tensor, ridge: float, *, weights: Tensor | None = None, left_out: bool = False
) -> tuple[Tensor, Tensor]:
    """The mixture of several models' logits that explains classes best: factors (m,) and biases (C,).

    The log-probabilities are those of ``sum_m factors_m scores_m + biases``; least ``mean cross-entropy + ridge / 2
    (|factors|^2 + |biases|^2)``.

    Args:
        scores: logits (n, C, m) float64.
        y: class ids (n,).
        weights: of the rows in the mean, (n,), of sum 1; None: all alike.
        left_out: whether the first model's are of rows left out of its fit. Its factor is then not below 0: such scores
            lean a little against a row's own class, as the means of all others do, and where the features say nothing a
            factor below 0 would read the classes off that (of 300 rows of chance with a likelihood of 0.66).
    """

    def objective(parameters: Sequence[Tensor]) -> Tensor:
        factors, biases = parameters
        fits = torch.nn.functional.cross_entropy(scores @ factors + biases, y, reduction="none")
        fit = fits.mean() if weights is None else weights @ fits
        return fit + 0.5 * ridge * (factors.square().sum() + biases.square().sum())

    start = [scores.new_zeros(scores.shape[2]), scores.new_zeros(scores.shape[1])]
    factors, biases = minimised(objective, start)
    if left_out and factors[0] < 0:
        scores = torch.cat([torch.zeros_like(scores[:, :, :1]), scores[:, :, 1:]], 2)
        factors, biases = minimised(objective, start)
    return factors, biases


def logistic(x: Tensor, y: Tensor, weights: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weighted logistic regression of ``y`` in {0, 1}: coefficients (d,) and intercept ().

    Args:
        x: (n, d) float64.
        weights: of the rows, (n,), of sum 1.
    """

    def objective(parameters: Sequence[Tensor]) -> Tensor:
        slopes, level = parameters
        fit = torch.nn.functional.binary_cross_entropy_with_logits(x @ slopes + level, y, reduction="none")
        return (weights * fit).sum() + 0.5 * ridge * slopes.square().sum()

    slopes, level = minimised(objective, [x.new_zeros(x.shape[1]), x.new_zeros(())])
    return slopes, level


def probability(odds: np.ndarray) -> np.ndarray:
    """Of log odds, (n,)."""
    likely: np.ndarray = 1 / (1 + np.exp(-np.clip(odds, -50, 50)))
    return likely


def folds_of(strata: np.ndarray | None, size: int, count: int, *, seed: int, purpose: str) -> np.ndarray:
    """A fold in 0..count-1 for each of ``size`` rows, (size,) int64, every stratum spread evenly over the folds."""
    keys = philox(seed, purpose).random(size)
    order = np.lexsort((keys, np.zeros(size, dtype=np.int64) if strata is None else strata))
    folds = np.empty(size, dtype=np.int64)
    folds[order] = np.arange(size) % count
    return folds


def sides(copies: np.ndarray | None, pool: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Groups of copies of a pool's rows, and of a query's behind them."""
    return (None, None) if copies is None else (copies[:pool], copies[pool:])
