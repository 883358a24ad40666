"""How probably a number that is to be learned is wrong: it is then one that has nothing to do with its text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tsqlora_scale.audit.share_belief import ShareBelief, believed

#: shares of wrong numbers that are weighed
GRID = tuple(np.linspace(0.0, 0.6, 25))
ITERATIONS = 50


@dataclass(frozen=True)
class NumberNoise:
    """What is believed of the numbers of a pool.

    Attributes:
        predicted: what the sources say, (n,).
        wrong: probability that the number given is another's, (n,).
        spread: standard deviation of a right number about its prediction.
        share: of wrong numbers.
        explained: the share of the numbers' variance that the sources explain.
    """

    predicted: np.ndarray
    wrong: np.ndarray
    spread: float
    share: ShareBelief
    explained: float


def judge_numbers(scores: np.ndarray, numbers: np.ndarray) -> NumberNoise:
    """A mixture: right numbers are normal about a linear function of the sources, wrong ones normal as all numbers are.

    As :func:`~.label_noise.judge_labels`, the share of wrong ones is weighed on a grid; function and spread are those
    of the largest likelihood for each, by expectation and maximisation.

    Args:
        scores: out of sample, (S, n): predictions of every source.
        numbers: given, (n,).
    """
    numbers = np.asarray(numbers, dtype=np.float64)
    design = np.column_stack([*scores, np.ones(len(numbers))])
    level, scale = float(numbers.mean()), float(numbers.std()) or 1.0
    blind = _log_normal(numbers, level, scale)
    evidence, shares = np.zeros(len(GRID)), np.zeros(len(GRID))
    found = []
    weights = np.ones(len(numbers))
    for place, rate in enumerate(GRID):
        for _ in range(ITERATIONS):
            predicted = design @ _least_squares(design, numbers, weights)
            spread = float(np.sqrt((weights * (numbers - predicted) ** 2).sum() / weights.sum()))
            spread = max(spread, 1e-3 * scale)
            right = np.log1p(-rate) + _log_normal(numbers, predicted, spread)
            wrong = np.log(rate) + blind if rate else np.full(len(numbers), -np.inf)
            total = np.logaddexp(right, wrong)
            before, weights = weights, np.exp(right - total)
            if np.abs(before - weights).max() < 1e-4:
                break
        evidence[place] = total.sum()
        shares[place] = float((1 - weights).mean())
        found.append((predicted, 1 - weights, spread))
    belief = believed(evidence, np.array(GRID))
    columns = [sum(b * column for b, column in zip(belief, kind, strict=True)) for kind in zip(*found, strict=True)]
    predicted, mistaken, spread = columns
    explained = 1 - float(((numbers - predicted) ** 2).mean()) / scale**2
    return NumberNoise(predicted, mistaken, float(spread), ShareBelief(np.array(GRID), belief, shares), explained)


def _least_squares(design: np.ndarray, numbers: np.ndarray, weights: np.ndarray) -> np.ndarray:
    root = np.sqrt(weights)[:, None]
    solution: np.ndarray = np.linalg.lstsq(design * root, numbers * root[:, 0], rcond=None)[0]
    return solution


def _log_normal(values: np.ndarray, middle: np.ndarray | float, spread: float) -> np.ndarray:
    density: np.ndarray = -0.5 * np.square((values - middle) / spread) - np.log(spread * np.sqrt(2 * np.pi))
    return density
