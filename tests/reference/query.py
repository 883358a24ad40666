"""The density ratio of a query's rows to a pool's, slow and plain: refits, loops over rows, pairs and thresholds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from tests.reference.advice import weighted_left_out, weighted_ridge


def ridge(x: np.ndarray, y: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (d, C) and biases (C,) of least squares with a ridge on the weights, by the normal equations."""
    wide = np.hstack([x, np.ones((len(x), 1))])
    penalty = strength * np.eye(wide.shape[1])
    penalty[-1, -1] = 0.0
    both = np.linalg.solve(wide.T @ wide + penalty, wide.T @ y)
    return both[:-1], both[-1]


def left_out(features: np.ndarray, targets: np.ndarray, strength: float) -> np.ndarray:
    """Mean over the layers of every row's prediction by a fit to all other rows, (n, C); one fit a row and layer."""
    found = np.zeros_like(targets)
    for row in range(len(targets)):
        others = np.arange(len(targets)) != row
        for layer in range(features.shape[1]):
            weights, bias = ridge(features[others, layer], targets[others], strength)
            found[row] += (features[row, layer] @ weights + bias) / features.shape[1]
    return found


def best_ridge(features: np.ndarray, targets: np.ndarray, strengths: tuple[float, ...]) -> float:
    """Of ``strengths`` the one whose predictions of rows left out are nearest."""
    errors = [np.square(left_out(features, targets, strength) - targets).mean() for strength in strengths]
    return strengths[int(np.argmin(errors))]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors."""
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def likeness(pool: np.ndarray, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean cosine of every row of the pool (N, R) and of the query (n, R) to the query's (other) rows, by layers.

    Args:
        pool: features (N, L, R, d).
        query: the same (n, L, R, d); all are standardised by the mean and deviation of both.
    """
    layers, regions = pool.shape[1:3]
    mean, deviation = np.zeros(pool.shape[1:]), np.zeros(pool.shape[1:])
    rows = [*pool, *query]
    for row in rows:
        mean += row / len(rows)
    for row in rows:
        deviation += np.square(row - mean) / len(rows)
    deviation = np.sqrt(deviation) + 1e-6

    def of(row: np.ndarray, to: list[np.ndarray], region: int) -> float:
        found = [
            cosine(((row - mean) / deviation)[layer, region], ((other - mean) / deviation)[layer, region])
            for layer in range(layers)
            for other in to
        ]
        return sum(found) / len(found)

    everything = list(query)
    of_pool = [[of(row, everything, region) for region in range(regions)] for row in pool]
    of_query = [
        [of(row, [other for place, other in enumerate(query) if place != own], region) for region in range(regions)]
        for own, row in enumerate(query)
    ]
    return np.array(of_pool), np.array(of_query)


def newton_logistic(x: np.ndarray, y: np.ndarray, weights: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    """Coefficients and intercept of a weighted logistic regression with a ridge on the coefficients, by Newton."""
    wide = np.hstack([x, np.ones((len(x), 1))])
    penalty = strength * np.eye(wide.shape[1])
    penalty[-1, -1] = 0.0
    found = np.zeros(wide.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-wide @ found))
        slope = wide.T @ (weights * (p - y)) + penalty @ found
        curvature = (wide * (weights * p * (1 - p))[:, None]).T @ wide + penalty
        found -= np.linalg.solve(curvature, slope)
    return found[:-1], float(found[-1])


def descended_log_linear(
    scores: np.ndarray, y: np.ndarray, strength: float, *, weights: np.ndarray | None = None, left_out: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Factors (m,) and biases (C,) of a log-linear mixture of logits (n, C, m), by plain gradient descent.

    Args:
        weights: of the rows (n,), of sum 1.
        left_out: whether the first factor is held at 0 or above, by a step back whenever it goes below.
    """
    factors, biases = np.zeros(scores.shape[2]), np.zeros(scores.shape[1])
    one_hot = np.eye(scores.shape[1])[y]
    part = np.full(len(y), 1 / len(y)) if weights is None else weights
    # of the cross-entropy's curvature no eigenvalue is larger
    step = 1 / (strength + 1 + part @ np.square(scores).sum((1, 2)))
    for _ in range(5_000):
        logits = scores @ factors + biases
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        error = part[:, None] * (p - one_hot)
        factors -= step * ((error[:, :, None] * scores).sum((0, 1)) + strength * factors)
        if left_out:
            factors[0] = max(factors[0], 0.0)
        biases -= step * (error.sum(0) + strength * biases)
    return factors, biases


def answers(
    x: np.ndarray,
    y: np.ndarray,
    weights: np.ndarray,
    judged: np.ndarray | None,
    unseen: tuple[np.ndarray, np.ndarray],
    *,
    classes: int | None,
    strengths: Sequence[float],
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods of answers (n,), each by a fit to all other rows, and of those of rows ``unseen``.

    Args:
        x: features (n, d).
        judged: places of the rows whose squared error, left out, decides among the ridge's ``strengths``; None: all.
        classes: None for numbers.
    """
    targets = y[:, None] if classes is None else np.eye(classes)[y]
    places = range(len(y)) if judged is None else judged.tolist()
    found = {each: weighted_left_out(x[:, None], targets, weights, each) for each in strengths}
    errors = {each: sum(np.square(told[row] - targets[row]).sum() for row in places) for each, told in found.items()}
    strength = min(strengths, key=lambda each: errors[each])
    slopes, bias = weighted_ridge(x, targets, weights, strength)
    held_out, others = found[strength], unseen[0] @ slopes + bias
    if classes is None:
        squares = sum(weight * (told[0] - own) ** 2 for weight, told, own in zip(weights, held_out, y, strict=True))
        deviation = math.sqrt(squares / sum(weights))

        def likely(told: np.ndarray, own: float) -> float:
            return -((own - told[0]) ** 2) / (2 * deviation**2) - math.log(deviation)
    else:
        scale = held_out.std()
        factors, biases = descended_log_linear(
            held_out[:, :, None] / scale, y, 1 / len(y), weights=weights / weights.sum(), left_out=True
        )

        def likely(told: np.ndarray, own: float) -> float:
            logits = told / scale * factors[0] + biases
            return float(logits[int(own)] - math.log(np.exp(logits).sum()))

    return (
        np.array([likely(told, own) for told, own in zip(held_out, y, strict=True)]),
        np.array([likely(told, own) for told, own in zip(others, unseen[1], strict=True)]),
    )


def area(of_pool: np.ndarray, of_query: np.ndarray) -> float:
    """Share of pairs in which the query's row is higher than the pool's; half of those that are level."""
    wins = sum(1.0 if q > p else 0.5 if q == p else 0.0 for q in of_query for p in of_pool)
    return wins / (len(of_pool) * len(of_query))


def wanted_share(of_pool: np.ndarray, of_query: np.ndarray, *, doubt: float = 0.1) -> tuple[float, float]:
    """Best bin estimation (Garg et al. 2021, Algorithm 1), threshold by threshold: an estimate and its upper bound."""
    margin = sum(math.sqrt(math.log(4 / doubt) / (2 * len(side))) for side in (of_query, of_pool))
    best = (math.inf, 0.0)
    for threshold in sorted(of_query):
        above_q = sum(value >= threshold for value in of_query) / len(of_query)
        above_p = sum(value >= threshold for value in of_pool) / len(of_pool)
        best = min(best, ((above_p + 1.01 * margin) / above_q, above_p / above_q))
    return min(max(best[1], 0.0), 1.0), min(max(best[0], 0.0), 1.0)


def mean_state(states: tuple[Tensor, ...], sample: int, positions: list[int]) -> np.ndarray:
    """Mean over ``positions`` of one sample's hidden states, (L, d); zeros where there is none."""
    found = []
    for layer in states:
        total = np.zeros(layer.shape[-1])
        for position in positions:
            total += layer[sample, position].double().numpy() / len(positions)
        found.append(total)
    return np.stack(found)
