"""Advice's formulas, slow and plain."""

from __future__ import annotations

import numpy as np


def weighted_ridge(x: np.ndarray, y: np.ndarray, weights: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (d, C) and biases (C,) of weighted least squares with a ridge on the weights, by the normal equations."""
    wide = np.hstack([x, np.ones((len(x), 1))])
    penalty = strength * np.eye(wide.shape[1])
    penalty[-1, -1] = 0.0
    both = np.linalg.solve(wide.T @ (weights[:, None] * wide) + penalty, wide.T @ (weights[:, None] * y))
    return both[:-1], both[-1]


def weighted_left_out(
    features: np.ndarray, targets: np.ndarray, weights: np.ndarray, strength: float, copies: np.ndarray | None = None
) -> np.ndarray:
    """Mean over the layers of every row's prediction by a fit to all other rows (n, C), but its copies; one fit a row
    and layer."""
    found = np.zeros_like(targets)
    groups = np.arange(len(targets)) if copies is None else copies
    for row in range(len(targets)):
        others = groups != groups[row]
        for layer in range(features.shape[1]):
            slopes, bias = weighted_ridge(features[others, layer], targets[others], weights[others], strength)
            found[row] += (features[row, layer] @ slopes + bias) / features.shape[1]
    return found


def resampled(values: list[float], drawn: list[list[int]]) -> list[float]:
    """The mean of every resample, row by row."""
    means = []
    for rows in drawn:
        total = 0.0
        for row in rows:
            total += values[row]
        means.append(total / len(rows))
    return means


def spare_share(texts: list[str]) -> float:
    """The share of texts that could go without one being lost."""
    return 1 - len(set(texts)) / len(texts)
