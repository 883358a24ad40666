"""Which run is next: pilots, then the runs that choose learning rates, then those that are reported."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.comparison.trial_outcome import Outcome, outcome_of
from tsqlora_scale.comparison.trials import Cell, Trial, TrialPlan
from tsqlora_scale.config.schema import Config

#: Order of purposes.
ORDER = {"pilot": 0, "tuning": 1, "report": 2}


@dataclass(frozen=True)
class Shard:
    """The share of one of several processes, ``number`` of ``count``, from 0."""

    number: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From ``1/4``.

        Raises:
            UserError: it is none.
        """
        number, _, count = text.partition("/")
        if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
            raise UserError(f"--shard {text!r} is not of the form NUMBER/COUNT with NUMBER from 0 to COUNT - 1")
        return cls(int(number), int(count))


class TrialQueue:
    """The runs of a comparison, as far as they are known: what is tuned tells which are reported.

    Args:
        shard: runs of a cell that is tuned or piloted, which wait for one another, are one process's.
        mean_tokens: of a sample of a config's pool, for a budget of tokens.
    """

    def __init__(
        self, trials: TrialPlan, *, shard: Shard | None = None, mean_tokens: Callable[[Config], float] | None = None
    ) -> None:
        self.trials = trials
        self._shard = shard or Shard()
        self._mean_tokens = mean_tokens
        self._tokens: dict[str, float] = {}
        self.outcomes: dict[Trial, Outcome] = {}
        #: Runs that have failed and are not tried again.
        self.failed: dict[Trial, str] = {}
        #: Cells whose budget is spent before the first step, and on what.
        self.spent: dict[Cell, str] = {}
        self.running: set[Trial] = set()

    def outcome(self, trial: Trial) -> Outcome:
        """What is there of a run; of finished ones it is read once."""
        found = self.outcomes.get(trial)
        if found is None or found.result is None:
            found = self.outcomes[trial] = outcome_of(self.trials, trial)
        return found

    def is_finished(self, trial: Trial) -> bool:
        """Whether it has a result."""
        return self.outcome(trial).result is not None

    def give_up(self, cell: Cell) -> None:
        """Count tuning runs whose last try has failed, in whatever process, as over: rates are chosen without them."""
        with contextlib.suppress(LookupError):
            for trial in self.tuning(cell):
                failure = self.outcome(trial).failure
                if failure is not None:
                    self.failed.setdefault(trial, failure)

    def steps(self, cell: Cell) -> int | None:
        """Optimizer steps that the budget is worth; None: the config's own length.

        Raises:
            LookupError: a pilot run says, and it is not finished; or it says that nothing is left (:attr:`spent`).
        """
        budget = self.trials.comparison.budget
        if budget is None:
            return None
        config = self.trials.config(self.trials.probe(cell))
        steps = budget.steps_of(config.train.batch_size)
        if steps is not None:
            return steps
        if budget.tokens is not None:
            assert self._mean_tokens is not None
            key = f"{config.model.name_or_path} {config.task.model_dump_json()}"
            if key not in self._tokens:
                self._tokens[key] = self._mean_tokens(config)
            return max(1, round(budget.tokens / (self._tokens[key] * config.train.batch_size)))
        assert budget.seconds is not None
        result = self.outcome(self.pilot(cell)).result
        if result is None:
            raise LookupError(cell)
        try:
            return steps_in(budget.seconds, result)
        except UserError as error:  # of this cell alone
            self.spent[cell] = str(error)
            raise LookupError(cell) from None

    def pilot(self, cell: Cell) -> Trial:
        """The short run that says how long a step of a cell takes."""
        budget, rates = self.trials.comparison.budget, self.trials.rates(cell)
        assert budget is not None
        seed = self.trials.comparison.seeds[0]
        return Trial(cell, "pilot", seed, rates[0] if rates else None, budget.pilot_steps)

    def tuning(self, cell: Cell) -> list[Trial]:
        """The runs that choose a cell's learning rate; seeds outermost."""
        if not self.trials.is_tuned(cell):
            return []
        steps, seeds = self.steps(cell), self.trials.comparison.tuning.seeds
        return [Trial(cell, "tuning", seed, rate, steps) for seed in seeds for rate in self.trials.rates(cell)]

    def rate(self, cell: Cell) -> float | None:
        """The learning rate of the runs that are reported: of the best mean on the tuning runs, ties to the smaller.

        A rate that lacks a seed which another one has is no candidate.

        Raises:
            LookupError: tuning has not finished, or no run of it.
        """
        rates = self.trials.rates(cell)
        if not self.trials.is_tuned(cell):
            return rates[0] if rates else None
        runs = self.tuning(cell)
        if any(not self.is_finished(run) and run not in self.failed for run in runs):
            raise LookupError(cell)
        values: dict[float, dict[int, float]] = {}
        for run in runs:
            result = self.outcome(run).result
            if result is not None and run.lr is not None:
                values.setdefault(run.lr, {})[run.seed] = signed_metric(result)
        fullest = max(values.values(), key=len, default={})
        candidates = [
            (float(np.mean([*found.values()])), -rate)
            for rate, found in values.items()
            if found.keys() == fullest.keys() and np.isfinite([*found.values()]).all()
        ]
        if not candidates:
            raise LookupError(cell)
        return -max(candidates)[1]

    def reported(self, cell: Cell) -> list[Trial]:
        """The runs of a cell that tables are of.

        Raises:
            LookupError: their learning rate or length is not known.
        """
        rate, steps = self.rate(cell), self.steps(cell)
        return [Trial(cell, "report", seed, rate, steps) for seed in self.trials.comparison.seeds]

    def known(self) -> list[Trial]:
        """All runs of this shard that are known of, finished or not, in order."""
        found: list[tuple[int, int, int, Trial]] = []
        for place, cell in enumerate(self.trials.cells):
            if cell in self.trials.refused:
                continue
            whole = self.trials.is_tuned(cell) or self._is_piloted
            if whole and place % self._shard.count != self._shard.number:
                continue
            for number, trial in enumerate(self.of_cell(cell)):
                turn = place * len(self.trials.comparison.seeds) + number
                if whole or turn % self._shard.count == self._shard.number:
                    found.append((ORDER[trial.purpose], self._seed_place(trial), place, trial))
        return [trial for *_, trial in sorted(found, key=lambda entry: entry[:3])]

    def next(self) -> Trial | None:
        """The next run to begin, or None where there is none, for now."""
        for trial in self.known():
            if trial not in self.running and trial not in self.failed and not self.is_finished(trial):
                return trial
        return None

    def most(self) -> int:
        """How many runs there are, those included that are not known yet."""
        comparison, total = self.trials.comparison, 0
        for place, cell in enumerate(self.trials.cells):
            if cell in self.trials.refused:
                continue
            tuned, seeds = self.trials.is_tuned(cell), len(comparison.seeds)
            whole = tuned or self._is_piloted
            if whole and place % self._shard.count != self._shard.number:
                continue
            count, number = self._shard.count, self._shard.number
            total += seeds if whole else sum((place * seeds + n) % count == number for n in range(seeds))
            total += self._is_piloted + tuned * len(comparison.tuning.seeds) * len(self.trials.rates(cell))
        return total

    @property
    def _is_piloted(self) -> bool:
        budget = self.trials.comparison.budget
        return budget is not None and budget.seconds is not None

    def of_cell(self, cell: Cell) -> list[Trial]:
        """The runs of a cell that are known of, in order."""
        found = [self.pilot(cell)] if self._is_piloted else []
        try:
            found += self.tuning(cell)
            found += self.reported(cell)
        except LookupError:  # of what is known
            pass
        return found

    def _seed_place(self, trial: Trial) -> int:
        comparison = self.trials.comparison
        seeds = comparison.tuning.seeds if trial.purpose == "tuning" else comparison.seeds
        return seeds.index(trial.seed)


def steps_in(seconds: float, pilot: dict[str, Any]) -> int:
    """Steps that fit into some seconds of training, scoring and resizing, by a pilot's ``result.json``.

    A schedule of fractions has as many events in a pilot as in the whole run, and so many passes of scores: what these
    take is spent once, and so is what plain text before the task takes.

    Raises:
        UserError: nothing is left for training.
    """
    spent = pilot["seconds"]
    once = {"pretraining": (pilot.get("pretraining") or {}).get("seconds", 0.0)}
    once |= {name: spent.get(name, 0.0) for name in ("scoring", "resizing")}
    left = seconds - sum(once.values())
    if left <= 0:
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in once.items() if value)
        raise UserError(f"budget.seconds={seconds:g} leaves none for training: {parts} (by the pilot run); raise it")
    each = sum(spent.get(name, 0.0) for name in ("warmup", "training")) / pilot["steps"]
    return max(1, int(left / each))


def signed_metric(result: dict[str, Any]) -> float:
    """The deciding metric of a result, or its negative where less is better: more is better."""
    task = result["task"]
    value = float(result["metrics"][task["decides"]])
    return value if task["higher_is_better"] else -value
