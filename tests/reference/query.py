"""The density ratio of a query's rows to a pool's, slow and plain: refits, loops over rows, pairs and thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


def left_out(
    features: np.ndarray, targets: np.ndarray, strength: float, copies: np.ndarray | None = None
) -> np.ndarray:
    """Mean over the layers of every row's prediction by a fit to all other rows (n, C), but its copies; one fit a row
    and layer."""
    found = np.zeros_like(targets)
    groups = np.arange(len(targets)) if copies is None else copies
    for row in range(len(targets)):
        others = groups != groups[row]
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


def leading(x: np.ndarray, count: int) -> np.ndarray:
    """The projection (d, d) on the ``count`` directions that explain most of rows (n, d), by singular values."""
    _, _, right = np.linalg.svd(x, full_matrices=False)
    return right[:count].T @ right[:count]


def prior_odds(log_ratio: float, share: float) -> float:
    """Log odds that a row is wanted whose text is ``exp(log_ratio)`` times likelier there."""
    probability = min(max(share * math.exp(log_ratio), 1e-3), 0.98)
    return math.log(probability) - math.log(1 - probability)


@dataclass
class Found:
    """Of a mixture: values (n, 3) of the pool's rows, of the query's, and of unseen ones; log odds of these and of the
    pool's; and the share."""

    pool: np.ndarray
    query: np.ndarray
    unseen: np.ndarray
    odds: np.ndarray
    unseen_odds: np.ndarray
    share: float
    handicap: float


def mixture(
    sides: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    wanted: np.ndarray,
    *,
    classes: int | None,
    directions: int,
    rounds: int,
    strengths: Sequence[float],
) -> Found:
    """A pool as a mixture of what is wanted and the rest, row by row and fit by fit.

    Args:
        sides: of the pool, of the query, and of rows that are not seen: features (n, L, 1, d), answers (n,), and the
            first look's terms (n, 3), of which the first is the text's and the third ``log p(y|x)``.
        wanted: the probability that a row of the pool is wanted, to begin with.
    """
    (pool, own, terms), (query, asked, of_query), (unseen, others, of_unseen) = sides
    both = np.concatenate([pool, query])[:, :, 0]
    mean, deviation = both.mean(0), both.std(0) + 1e-6
    layers = both.shape[1]
    kept = [leading(((both - mean) / deviation)[:, layer], directions // layers) for layer in range(layers)]

    def seen(features: np.ndarray) -> np.ndarray:
        scaled = (features[:, :, 0] - mean) / deviation
        return np.concatenate([scaled[:, layer] @ kept[layer] for layer in range(layers)], 1)

    x, z, new = seen(pool), seen(query), seen(unseen)
    ratio = _balanced(terms[:, 0], of_query[:, 0])
    sure = [min(max(each, 1e-3), 1 - 1e-3) for each in wanted]
    places = np.arange(len(x), len(x) + len(z))
    everything, every_answer = np.concatenate([x, z]), np.concatenate([own, asked])
    for _ in range(rounds):
        share = sum(sure) / len(sure)
        weights = np.array([*sure, *[1.0] * len(z)])
        log_wanted, new_wanted = answers(
            everything, every_answer, weights, places, (new, others), classes=classes, strengths=strengths
        )
        rest = (np.concatenate([z, new]), np.concatenate([asked, others]))
        turned = np.array([1 - each for each in sure])
        log_rest, rest_elsewhere = answers(x, own, turned, None, rest, classes=classes, strengths=strengths)
        behind = [rest_elsewhere[row] - log_wanted[len(x) + row] for row in range(len(z))]
        handicap = max(sum(behind) / len(behind), 0.0)
        odds = [
            prior_odds(ratio(terms[row, 0]), share) + log_wanted[row] + handicap - log_rest[row]
            for row in range(len(x))
        ]
        sure = [min(max(1 / (1 + math.exp(-each)), 1e-3), 1 - 1e-3) for each in odds]
    usual = _usual(own, classes)

    def joined(log_q: np.ndarray, log_h: np.ndarray, side: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
        gains = [log_p - usual(answer) for answer, log_p in zip(side[1], side[2][:, 2], strict=True)]
        return np.column_stack([log_q, log_h, gains])

    of_new = joined(new_wanted, rest_elsewhere[len(z) :], sides[2])
    return Found(
        pool=joined(log_wanted[: len(x)], log_rest, sides[0]),
        query=joined(log_wanted[len(x) :], rest_elsewhere[: len(z)], sides[1]),
        unseen=of_new,
        odds=np.array(odds),
        unseen_odds=np.array(
            [
                prior_odds(ratio(text), share) + row[0] + handicap - row[1]
                for text, row in zip(of_unseen[:, 0], of_new, strict=True)
            ]
        ),
        share=share,
        handicap=handicap,
    )


def _balanced(of_pool: np.ndarray, of_query: np.ndarray) -> Callable[[float], float]:
    """The log ratio of query to pool by one term, no lower where there is more of it."""
    both = np.concatenate([of_pool, of_query])
    mean, deviation = both.mean(), both.std()
    sides = np.repeat([0.0, 1.0], [len(of_pool), len(of_query)])
    weights = np.repeat([0.5 / len(of_pool), 0.5 / len(of_query)], [len(of_pool), len(of_query)])
    (slope,), level = newton_logistic(((both - mean) / deviation)[:, None], sides, weights, 1e-2)
    return lambda term: (term - mean) / deviation * slope + level if slope > 0 else 0.0


def _usual(found: np.ndarray, classes: int | None) -> Callable[[float], float]:
    """How likely an answer is whatever the text: of a class one more than there are, of a number by a normal."""
    if classes is None:
        mean, deviation = found.mean(), found.std()
        return lambda answer: -((answer - mean) ** 2) / (2 * deviation**2) - math.log(deviation)
    return lambda answer: math.log((list(found).count(int(answer)) + 1) / (len(found) + classes))


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
