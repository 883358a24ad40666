"""Trials by heads on the frozen base's features, in closed form: seconds."""

from __future__ import annotations

import numpy as np
import torch

from tsqlora_scale.advice.pilot import ALONE, EVEN, POOL, QUERY, Pilot, ways_of
from tsqlora_scale.advice.pool_sample import PoolSample
from tsqlora_scale.advice.query_choice import choice_by_others
from tsqlora_scale.config.schema import Config
from tsqlora_scale.quality.query.feature_heads import fit_heads
from tsqlora_scale.quality.query.fits import folds_of, log_linear

#: Parts of the query, each judging what the others have chosen.
FOLDS = 8
#: The least weight of a row that a fit has: the roots of weights are divided by.
LEAST = 1e-6


def head_pilot(config: Config, sample: PoolSample, *, classes: int) -> Pilot:
    """Every fold of the query judges heads for which it has chosen nothing and on which it has not been trained.

    The ridge of every way is the one that is best on the query's other rows, each left out; probabilities are
    calibrated on the same. So no way is better for a tuning that another lacks.

    Args:
        classes: of the task; 1 for numbers.
    """
    count, rows = sample.count, len(sample.query)
    answers = sample.answers[count:]
    labelled = sample.shape.kind == "classes"
    strata = answers.astype(np.int64) if labelled else None
    folds = folds_of(strata, rows, min(FOLDS, rows), seed=config.run.seed, purpose="advice folds")
    ways = ways_of(config)
    fits = {way: np.zeros(rows) for way in ways}
    hits = {way: np.zeros(rows) for way in ways}
    for fold in np.unique(folds):
        out = folds == fold
        for way, (fit, hit) in _judged(config, sample, out, classes=classes).items():
            fits[way][out], hits[way][out] = fit, hit
    return Pilot("heads", fits, hits if labelled else None)


def _judged(
    config: Config, sample: PoolSample, out: np.ndarray, *, classes: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Log-likelihoods and hits of the query's rows ``out`` (m,) bool by heads that the others have chosen."""
    count = sample.count
    known, others = np.split(sample.without(out), [count])
    pool, rest, held_out = sample.numbers[:count], sample.numbers[count:][others], sample.numbers[count:][out]
    labelled = sample.shape.kind == "classes"
    ratio, chosen = choice_by_others(config, sample, ~others, classes=classes)
    likeness = ratio.likeness
    assert likeness is not None
    features, targets = {}, {}
    for name, numbers in (("pool", pool), ("rest", rest), ("out", held_out)):
        seen, found = sample.shape.split(numbers)
        features[name] = likeness.standardised(seen)[:, :, 0].astype(np.float64)
        targets[name] = np.eye(classes)[found.astype(np.int64)] if labelled else found.astype(np.float64)[:, None]
    all_of_it = sample.weights[count:][others]
    joined, none_of_it = all_of_it * (1.0 if config.task.train_on_query else LEAST), all_of_it * LEAST
    drawn = sample.weights[:count] * known
    evenly = sample.in_shares(drawn)
    of_pool = {EVEN: evenly, ALONE: np.zeros(count), QUERY: sample.in_shares(drawn * chosen), POOL: evenly}
    of_query = {EVEN: joined, ALONE: all_of_it, QUERY: joined, POOL: none_of_it}
    judged = {}
    for way in ways_of(config):
        used = of_pool[way] > 0
        x = np.concatenate([features["pool"][used], features["rest"]])
        y = np.concatenate([targets["pool"][used], targets["rest"]])
        weights = np.concatenate([of_pool[way][used], of_query[way]])
        place = np.arange(int(used.sum()), len(x))
        copies = sample.copies[np.append(used, others)]
        heads, left_out = fit_heads(x, y, weights=_of_effect(weights), judged=place, copies=copies)
        told = heads.scores(features["out"])
        judge = _classes_judged if labelled else _numbers_judged
        judged[way] = judge(left_out[place], targets["rest"], told, targets["out"])
    return judged


def _of_effect(weights: np.ndarray) -> np.ndarray:
    """Weights (n,) whose sum is the number of rows that they are worth, so that a ridge means the same."""
    scaled: np.ndarray = np.maximum(weights * (weights.sum() / np.square(weights).sum()), LEAST)
    return scaled


def _classes_judged(
    known: np.ndarray, answers: np.ndarray, told: np.ndarray, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods and hits (k,) of one-hot ``right`` (k, C) by scores ``told``, whose confidence, and the classes'
    shares, are those that known rows bear out; but what is told is not turned round, as no run would be."""
    scale = float(known.std()) + 1e-9
    y = torch.from_numpy(answers.argmax(1))
    for held in (1.0, 0.0):
        factors, biases = log_linear(torch.from_numpy(held * known / scale)[:, :, None], y, 1 / len(y))
        if float(factors) >= 0:
            break
    logits = torch.from_numpy(held * told / scale)[:, :, None] @ factors + biases
    labels = right.argmax(1)
    fits: np.ndarray = logits.log_softmax(1).numpy()[np.arange(len(right)), labels]
    return fits, (told.argmax(1) == labels).astype(np.float64)


def _numbers_judged(
    known: np.ndarray, answers: np.ndarray, told: np.ndarray, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods (k,) of numbers ``right`` (k, 1), normal about ``told``; of hits there is nothing to say."""
    spread = float(np.sqrt(np.square(known - answers).mean())) + 1e-9
    fits: np.ndarray = -0.5 * np.square((right - told)[:, 0] / spread) - np.log(spread)
    return fits, np.zeros(len(right))
