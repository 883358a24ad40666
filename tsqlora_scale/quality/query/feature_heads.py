"""Linear heads on frozen features by least squares, every row scored by heads that have not seen it.

The prediction of a row by the fit to all others has a closed form (Allen's PRESS residuals), so that leaving every row
out once costs no more than one fit; and one decomposition of the features serves every strength of the ridge.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Strengths of the ridge that are tried, in units of the sum of squares of a standardised feature over n rows / n.
RIDGES = (3e1, 1e2, 3e2, 1e3, 3e3, 1e4, 3e4, 1e5)


@dataclass(frozen=True)
class Heads:
    """One head a layer, whose scores are averaged.

    Attributes:
        weights: (L, d, C).
        bias: (C,).
        ridge: the strength, of :data:`RIDGES`, with the least square error on rows left out.
    """

    weights: np.ndarray
    bias: np.ndarray
    ridge: float

    def scores(self, features: np.ndarray) -> np.ndarray:
        """(n, C) of rows that the heads have not seen, from their features (n, L, d)."""
        layers, width, outputs = self.weights.shape
        flat = features.reshape(len(features), layers * width)
        mean: np.ndarray = flat @ self.weights.reshape(layers * width, outputs) / layers + self.bias
        return mean


def fit_heads(
    features: np.ndarray,
    targets: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    judged: np.ndarray | None = None,
    copies: np.ndarray | None = None,
) -> tuple[Heads, np.ndarray]:
    """Heads that explain ``targets``, and every row's scores by heads fitted to all other rows, (n, C).

    Args:
        features: (n, L, d) float64, n >= 2.
        targets: (n, C) float64: classes one-hot, or a number (C = 1).
        weights: of the rows' squared errors, (n,), above 0; None: 1 each.
        judged: places of the rows whose error, left out, chooses the ridge; None: all.
        copies: numbers of groups of rows whose features are the same, (n,): heads that have seen a row's copy have
            seen the row, so that a group is left out as a whole. None: there are none.
    """
    if copies is not None:
        count, copies = len(copies), np.unique(copies, return_inverse=True)[1]
        copies = None if int(copies.max()) + 1 == count else copies
    layers = [_layer(features[:, layer], targets, weights, copies) for layer in range(features.shape[1])]
    held_out = np.mean([left_out for left_out, _, _ in layers], axis=0)  # (ridges, n, C)
    errors = np.square(held_out - targets)
    best = int(np.argmin((errors if judged is None else errors[:, judged]).mean((1, 2))))
    slopes = np.stack([w[best] for _, w, _ in layers])
    bias = np.mean([b[best] for _, _, b in layers], axis=0)
    return Heads(slopes, bias, RIDGES[best]), held_out[best]


def _layer(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray | None, copies: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every ridge: scores of the rows left out (k, n, C), weights (k, d, C), biases (k, C)."""
    if weights is None:
        center, level = x.mean(0), y.mean(0)
        root, part = np.ones((len(x), 1)), np.full(len(x), 1 / len(x))
    else:  # least squares of rows times the roots of their weights
        root, part = np.sqrt(weights)[:, None], weights / weights.sum()
        center, level = part @ x, part @ y
    centred = (x - center) * root
    # the smaller of the two Gram matrices: eigenvectors of one give those of the other
    wide = centred.shape[1] > len(centred)
    squares, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    usable = squares > squares[-1] * 1e-12
    squares, vectors = squares[usable], vectors[:, usable]
    left = vectors if wide else centred @ vectors / np.sqrt(squares)
    right = centred.T @ vectors / np.sqrt(squares) if wide else vectors
    of_targets = left.T @ ((y - level) * root)
    held_out, slopes, biases = [], [], []
    for ridge in RIDGES:
        shrunk = squares / (squares + ridge)
        fitted = (left * shrunk) @ of_targets / root + level
        held_out.append(_without(y, fitted, np.square(left) @ shrunk + part, copies))
        slopes.append(right @ ((np.sqrt(squares) / (squares + ridge))[:, None] * of_targets))
        biases.append(level - center @ slopes[-1])
    return np.stack(held_out), np.stack(slopes), np.stack(biases)


def _without(y: np.ndarray, fitted: np.ndarray, leverage: np.ndarray, copies: np.ndarray | None) -> np.ndarray:
    """Scores (n, C) by the fits without a row, or without its group: what these have added is taken out again."""
    if copies is None:
        alone: np.ndarray = y - (y - fitted) / (1 - np.minimum(leverage, 1 - 1e-9))[:, None]
        return alone
    own = np.stack([np.bincount(copies, leverage * column) for column in y.T], 1)
    of_group = np.minimum(np.bincount(copies, leverage)[copies], 1 - 1e-9)
    found: np.ndarray = (fitted - own[copies]) / (1 - of_group)[:, None]
    return found
