"""Fair numbers from the runs of a study: what is chosen on what, what is paired with what, and how sure it is.

A run trains with a constant learning rate and is evaluated every so many steps, so that it is a run of every length.
Learning rate and steps of an arm are chosen on the ``tune`` rows of runs of the *tuning seeds*; what is reported is of
the ``test`` rows and of other seeds, each with a pool, a query and a head of its own, the same for all arms.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora_scale.comparison.estimates import Estimate, interval

#: Metrics of which less is better.
LESS_IS_BETTER = ("loss", "perplexity", "mse", "mae")


@dataclass(frozen=True)
class TrialKey:
    """Which run of a study."""

    study: str
    pool: str
    seed: int
    arm: str
    lr: float


@dataclass(frozen=True)
class Trial:
    """A finished run.

    Attributes:
        curve: step -> held-out set -> metric -> value; step 0 is before training.
        metric: the pool's.
        seconds: wall seconds by phase of the run.
        extra_seconds: what was spent on the choice before the run (an audit).
        rows: of the pool's rows, those that the choice has kept; None where nothing was chosen.
        share: of the draws among these, the share of good ones; ``auc``: of the scores, to tell good from bad.
    """

    key: TrialKey
    curve: Mapping[int, Mapping[str, Mapping[str, float]]]
    metric: str
    seconds: Mapping[str, float]
    extra_seconds: float = 0.0
    rows: int | None = None
    share: float | None = None
    auc: float | None = None

    @property
    def last_step(self) -> int:
        """Steps of the whole run."""
        return max(self.curve)

    @property
    def selection_seconds(self) -> float:
        """What the choice cost beside the steps."""
        return self.seconds.get("scoring", 0.0) + self.extra_seconds

    @property
    def step_seconds(self) -> float:
        """Of one step."""
        return (self.seconds.get("training", 0.0) + self.seconds.get("warmup", 0.0)) / self.last_step

    def steps(self, most: int) -> list[int]:
        """Those that were evaluated, after 0 and up to ``most``, in order."""
        return sorted(step for step in self.curve if 0 < step <= most)

    def value(self, step: int, rows: str, metric: str | None = None) -> float:
        """Of a held-out set."""
        return self.curve[step][rows][metric or self.metric]

    def best_step(self, rows: str, most: int) -> int:
        """The step that is best on a set, the earliest of equal ones. The pool's own rows judge by their loss."""
        metric = self.metric if rows == "tune" else "loss"
        return max(self.steps(most), key=lambda step: (signed(self.value(step, rows, metric), metric), -step))


def signed(value: float, metric: str) -> float:
    """The value, or its negative where less is better: more is better."""
    return -value if metric in LESS_IS_BETTER else value


def read_trials(path: Path) -> dict[TrialKey, Trial]:
    """The finished runs of a ``results.jsonl``; those that failed are not among them, and half a line is not read."""
    trials = [trial_of(record) for record in _records(path) if record.get("error") is None]
    return {trial.key: trial for trial in trials}


def read_failures(path: Path) -> list[dict[str, str]]:
    """``arm``, ``pool`` and ``reason`` of the runs that failed, whether or not another try has gone better."""
    failed = [record for record in _records(path) if record.get("error") is not None]
    return [{"arm": record["arm"], "pool": record["pool"], "reason": record["error"]} for record in failed]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:  # the last one of a process that was killed
            continue


def trial_of(record: Mapping[str, Any]) -> Trial:
    """From a line of ``results.jsonl``."""
    return Trial(
        key=TrialKey(*(record[name] for name in ("study", "pool", "seed", "arm", "lr"))),
        curve={int(step): sets for step, sets in record["curve"].items()},
        share=record.get("drawn_share") if record.get("drawn_share") is not None else record["share"],
        **{name: record[name] for name in ("metric", "seconds", "extra_seconds", "rows", "auc")},
    )


@dataclass(frozen=True)
class Choice:
    """What tuning has chosen for an arm on a pool; ``step`` is None where each run's own rows say when to stop."""

    lr: float
    step: int | None


def choose(trials: Iterable[Trial], *, seeds: Sequence[int], judged_by: str, most: int) -> Choice | None:
    """Learning rate and step of the best mean on ``tune`` over the tuning seeds; ties go to the fewer steps, then to
    the smaller rate.

    Args:
        trials: of one arm on one pool.
        seeds: of tuning. Rates that lack a seed which another rate has are no candidates. Without any, nothing is
            chosen: it is the one rate that was run, and ``most`` steps.
        judged_by: ``tune``, or the set by which every run chooses its own step; the rate is chosen on ``tune`` then,
            too.

    Returns:
        None without a run.
    """
    if not seeds:
        rates = sorted({trial.key.lr for trial in trials})
        return Choice(rates[0], most if judged_by == "tune" else None) if rates else None
    by_rate: dict[float, list[Trial]] = {}
    for trial in trials:
        if trial.key.seed in seeds:
            by_rate.setdefault(trial.key.lr, []).append(trial)
    fullest = max((len(runs) for runs in by_rate.values()), default=0)
    candidates: list[tuple[float, int, float, Choice]] = []
    for rate, runs in by_rate.items():
        if len(runs) < fullest:
            continue
        if judged_by != "tune":
            values = [signed(run.value(run.best_step(judged_by, most), "tune"), run.metric) for run in runs]
            candidates.append((float(np.mean(values)), 0, -rate, Choice(rate, None)))
            continue
        for step in sorted(set.intersection(*(set(run.steps(most)) for run in runs))):
            mean = float(np.mean([signed(run.value(step, "tune"), run.metric) for run in runs]))
            candidates.append((mean, -step, -rate, Choice(rate, step)))
    return max(candidates, key=lambda candidate: candidate[:3])[3] if candidates else None


def step_of(trial: Trial, choice: Choice, *, judged_by: str, most: int) -> int:
    """The step that is reported of a run."""
    return trial.best_step(judged_by, most) if choice.step is None else choice.step


def value_after(trial: Trial, step: float, rows: str = "test") -> tuple[float, bool]:
    """The value after any number of steps, linear between evaluations; and whether the run has come so far."""
    steps = sorted(trial.curve)
    values = [trial.value(known, rows) for known in steps]
    return float(np.interp(step, steps, values)), step <= steps[-1]


def after_equal_time(baseline: Trial, step: int, seconds: float) -> tuple[float, bool]:
    """What the baseline has at ``test`` when it trains on for the ``seconds`` that another arm's choice has cost."""
    return value_after(baseline, step + seconds / baseline.step_seconds)


def way(ours: Sequence[float], baselines: Sequence[Sequence[float]], oracle: Sequence[float]) -> Estimate:
    """The share of the way from the better baseline (by its mean) to the oracle; one value a seed, more is better.

    Which baseline is better is asked anew in every resample. Where the oracle is no better there is no way: NaN.
    """
    samples = np.stack([np.asarray(values, dtype=np.float64) for values in (ours, oracle, *baselines)], axis=1)

    def share(drawn: np.ndarray) -> np.ndarray:
        means = drawn.mean(axis=1)
        base = means[:, 2:].max(axis=1)
        length = means[:, 1] - base
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(length > 0, (means[:, 0] - base) / length, np.nan)

    value = float(share(samples[None])[0])
    if not np.isfinite(value):
        return Estimate(value, float("nan"), float("nan"))
    return Estimate(value, *interval(samples, share))


def auc(scores: np.ndarray, good: np.ndarray) -> float | None:
    """Area under the ROC curve with which scores (N,) tell the good (N,) bool: the share of pairs of a good and a bad
    one in which the good one has more, ties half. None where all are alike."""
    if good.all() or not good.any():
        return None
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # from 1, ties share their mean
    wins = ranks[good].sum() - good.sum() * (good.sum() + 1) / 2
    return float(wins / (good.sum() * (~good).sum()))
