"""Which shares of a pool are wrongly labelled, redundant, or off target, as far as a part of it shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tsqlora_scale.advice.paired import LEVEL, resampled_means
from tsqlora_scale.advice.pool_sample import PoolSample
from tsqlora_scale.advice.query_choice import PoolRatio
from tsqlora_scale.audit.auditor import of_one_variance, texts_of_pool
from tsqlora_scale.audit.findings import WEAK_EXPLAINED, WEAK_GAIN
from tsqlora_scale.audit.label_noise import judge_labels
from tsqlora_scale.audit.number_noise import judge_numbers
from tsqlora_scale.audit.ridge import left_out_predictions
from tsqlora_scale.common.copies import copy_groups, text_groups
from tsqlora_scale.quality.draws.redundancy import similar_pairs
from tsqlora_scale.run.training_run import Run

#: Cosine of two samples' features from which on they are nearly the same.
SIMILARITY = 0.98
#: Samples of a pool whose texts are all compared; of a larger one those that were looked at.
COMPARED = 1_000_000


@dataclass(frozen=True)
class PoolShare:
    """A share of a pool and its 90 % interval.

    Attributes:
        note: what limits it; nothing: no limit is known.
    """

    share: float
    low: float
    high: float
    note: str = ""

    def summary(self) -> dict[str, object]:
        """For a file."""
        found = {"share": round(self.share, 4), "between": [round(self.low, 4), round(self.high, 4)]}
        return {**found, "note": self.note} if self.note else found


def off_target(ratio: PoolRatio, *, seed: int) -> PoolShare:
    """The share that is not as the query is."""
    high = 1 - min(ratio.least(seed=seed), ratio.standing.share)
    note = "" if ratio.standing.is_evident else "the query hardly stands out of the pool: this is a guess"
    low = 1 - max(ratio.standing.most, ratio.standing.share)
    return PoolShare(1 - ratio.standing.share, low, high, note)


def wrong_labels(sample: PoolSample, groups: np.ndarray, *, classes: int, seed: int) -> PoolShare | None:
    """The share of wrong labels, by regressions on frozen features that have not seen the sample nor its copies.

    None where answers are texts, or are all alike.

    Args:
        groups: of copies, of every row of the pool that was looked at, (n,).
        classes: of the task; 1 for numbers.
    """
    answers = sample.answers[: sample.count]
    if sample.shape.kind == "text" or len(np.unique(answers)) < 2:
        return None
    labelled = sample.shape.kind == "classes"
    targets = np.eye(classes)[answers.astype(np.int64)] if labelled else answers[:, None].astype(np.float64)
    told, _ = left_out_predictions(sample.states[: sample.count], targets, groups)
    if labelled:
        noise = judge_labels(told[None], answers.astype(np.int64), seed=seed)
        belief, is_weak = noise.share, noise.gain < WEAK_GAIN
    else:
        numbers = judge_numbers(told[None, :, 0], answers)
        belief, is_weak = numbers.share, numbers.explained < WEAK_EXPLAINED
    note = "the features hardly tell one label from another: this says little" if is_weak else ""
    return PoolShare(belief.share, *belief.interval(LEVEL), note)


def near_copies(run: Run, sample: PoolSample) -> tuple[np.ndarray, np.ndarray]:
    """Groups of copies and near-copies among the rows looked at, and how often each row's text is in the pool, (n,)
    both. On one rank."""
    if sample.size <= COMPARED:
        texts = texts_of_pool(run, answered=True)
        member = text_groups([text] for place, text in enumerate(texts) if place < sample.size)
        member, times = member[sample.rows], np.bincount(member)[member[sample.rows]]
    else:
        member = text_groups(run.task.texts(sample.rows))
        times = np.bincount(member)[member]
    _, first, own = np.unique(member, return_index=True, return_inverse=True)
    exact = np.column_stack([first[own], np.arange(sample.count)])
    states = of_one_variance(sample.states[: sample.count], np.arange(sample.count))
    near = similar_pairs(states, SIMILARITY, seed=run.config.run.seed)  # all pairs: the rows are few
    if sample.shape.kind == "text":  # features are of what is asked: with another answer it is another row
        answers = text_groups([texts[-1]] for texts in run.task.texts(sample.rows))
        near = near[answers[near[:, 0]] == answers[near[:, 1]]]
    return copy_groups(np.concatenate([exact, near]), sample.count), times


def redundant(sample: PoolSample, groups: np.ndarray, times: np.ndarray, *, seed: int) -> PoolShare:
    """The share of rows that could go without a text being lost: 1 less the number of groups, by rows.

    A row of a group of k is one k-th of a group, so the mean of 1/k over random rows estimates groups by rows. Copies
    to the letter are counted in the whole pool, near-copies among the rows looked at.

    Args:
        groups: of every row, (n,): see :func:`near_copies`.
        times: how often each row's text is in the pool, (n,).
    """
    _, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    spare = 1 - 1 / np.maximum(sizes[member], times)
    share = float(spare.mean())
    if sample.is_whole:
        return PoolShare(share, share, share)
    low, high = np.quantile(resampled_means(spare, seed=seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    what = "near-copies" if sample.size <= COMPARED else "copies and near-copies"
    return PoolShare(
        share, float(low), float(high), f"at least: {what} of rows that were not looked at are not counted"
    )
