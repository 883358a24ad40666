"""Which runs a study has, in an order in which a queue that breaks off leaves whole comparisons behind."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.studies.arms import ARMS
from benchmarks.studies.fair import Choice, Trial, TrialKey, choose


@dataclass(frozen=True)
class Job:
    """A run that is to be made, and the size that its arm asks for."""

    key: TrialKey
    size: int | None = None


@dataclass
class Queue:
    """The runs of a study: first those of the tuning seeds with every learning rate, then those of the seeds that are
    reported, with the rate that the former have chosen. Seeds are outermost, arms innermost.

    Attributes:
        cells: the arms of every pool, both in order.
        most: steps that are chosen among.
        trials: what is finished.
        failed: what has been tried in vain in this process.
        running: what is being run.
    """

    study: str
    cells: Mapping[str, Sequence[str]]
    rates: Sequence[float]
    tuning: Sequence[int]
    seeds: Sequence[int]
    most: int
    trials: dict[TrialKey, Trial]
    failed: set[TrialKey] = field(default_factory=set)
    running: set[TrialKey] = field(default_factory=set)

    def next(self) -> Job | None:
        """The first run that can be made now and is not; None when none can, yet or any more."""
        for key in [*self._tuning_keys(), *self._report_keys()]:
            if key in self.trials or key in self.failed or key in self.running:
                continue
            sized_by = ARMS[key.arm].sized_by
            if sized_by is None:
                return Job(key)
            size = self._size(key, sized_by)
            if size is not None:
                return Job(key, size)
        return None

    def choice(self, pool: str, arm: str) -> Choice | None:
        """What tuning has chosen; None while it goes on, and where all of its runs failed."""
        if not self.tuning:
            return Choice(self.rates[0], self.most)
        keys = [key for key in self._tuning_keys() if (key.pool, key.arm) == (pool, arm)]
        if any(key not in self.trials and key not in self.failed for key in keys):
            return None
        runs = [self.trials[key] for key in keys if key in self.trials]
        return choose(runs, seeds=self.tuning, judged_by=ARMS[arm].judged_by, most=self.most)

    def unfinished(self) -> int:
        """Runs that are left, as far as that is known."""
        keys = [*self._tuning_keys(), *self._report_keys()]
        waiting = sum(
            len(self.seeds) for pool, arms in self.cells.items() for arm in arms if self.choice(pool, arm) is None
        )
        return sum(key not in self.trials for key in keys) + waiting

    def _tuning_keys(self) -> Iterator[TrialKey]:
        for seed in self.tuning:
            for pool, arms in self.cells.items():
                for rate in self.rates:
                    yield from (TrialKey(self.study, pool, seed, arm, rate) for arm in arms)

    def _report_keys(self) -> Iterator[TrialKey]:
        choices = {(pool, arm): self.choice(pool, arm) for pool, arms in self.cells.items() for arm in arms}
        for seed in self.seeds:
            for pool, arms in self.cells.items():
                for arm in arms:
                    choice = choices[pool, arm]
                    if choice is not None:
                        yield TrialKey(self.study, pool, seed, arm, choice.lr)

    def _size(self, key: TrialKey, arm: str) -> int | None:
        """What another arm has kept on the same pool and seed; with the same rate if that was run, else the least."""
        sizes = {
            trial.key.lr: trial.rows
            for trial in self.trials.values()
            if (trial.key.study, trial.key.pool, trial.key.seed, trial.key.arm) == (key.study, key.pool, key.seed, arm)
            and trial.rows is not None
        }
        if key.lr in sizes:
            return sizes[key.lr]
        same = TrialKey(key.study, key.pool, key.seed, arm, key.lr)
        comes = same not in self.failed and key.seed in self.tuning
        return None if comes or not sizes else sizes[min(sizes)]


def describe(keys: Collection[TrialKey]) -> str:
    """For people."""
    return ", ".join(f"{key.pool}/{key.arm}/{key.seed}/{key.lr:g}" for key in keys)
