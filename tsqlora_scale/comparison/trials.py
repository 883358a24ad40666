"""The runs of a comparison: which there are, by which configs, and in which order."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.comparison.comparison_file import Comparison, as_overrides
from tsqlora_scale.config.load import load_config
from tsqlora_scale.config.schema import Config
from tsqlora_scale.run.plan import check_length

Purpose = Literal["pilot", "tuning", "report"]

#: Keys of ``task`` that a run fills in where they have these values.
FILLED_IN: dict[str, Any] = {"labels": None, "prompt_base": None, "label_words": "auto", "demonstrated": []}


@dataclass(frozen=True)
class Cell:
    """A method on a task: the runs that share a learning rate and a length."""

    task: str
    method: str

    def __str__(self) -> str:
        return f"{self.method} on {self.task}"


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        lr: None: the config's own.
        steps: None: the config's own length.
    """

    cell: Cell
    purpose: Purpose
    seed: int
    lr: float | None = None
    steps: int | None = None

    @property
    def name(self) -> str:
        """``run.name``."""
        rate = "" if self.lr is None else f"lr{self.lr:g}-"
        purpose = "" if self.purpose == "report" else f"{self.purpose}-"
        return f"{purpose}{rate}seed{self.seed}"

    def __str__(self) -> str:
        words = [str(self.cell), *([f"lr {self.lr:g}"] if self.lr is not None else []), f"seed {self.seed}"]
        return ", ".join([*words, *([self.purpose] if self.purpose != "report" else [])])


class TrialPlan:
    """What there is to run.

    Args:
        out: the comparison's folder; runs lie in ``out/runs/TASK/ARM/``.
        overrides: ``section.key=value`` of the command line, for all runs.
    """

    def __init__(self, comparison: Comparison, out: Path, overrides: Sequence[str] = ()) -> None:
        self.comparison = comparison
        self.out = out
        self._overrides = list(overrides)
        #: Cells whose configs are refused, and why.
        self.refused: dict[Cell, str] = {}
        self._configs: dict[Trial, Config] = {}

    @property
    def cells(self) -> list[Cell]:
        """Every method on every task, tasks outermost; those that are refused, too."""
        return [
            Cell(name, method)
            for name, task in self.comparison.tasks.items()
            for method, (_, _, variant) in self.comparison.methods.items()
            if task.variants is None or variant in task.variants
        ]

    def rates(self, cell: Cell) -> list[float]:
        """Learning rates to choose from; none where there is no choice."""
        return self.comparison.rates(self.comparison.methods[cell.method][0])

    def is_tuned(self, cell: Cell) -> bool:
        """Whether there are runs that choose its learning rate; of one rate there is nothing to choose."""
        return len(self.rates(cell)) > 1

    @property
    def is_halved(self) -> bool:
        """Whether one half of the held-out rows chooses: what is reported of all arms is then of the other half."""
        return self.comparison.tuning.half and any(self.is_tuned(cell) for cell in self.cells)

    def baseline(self, method: str) -> str | None:
        """The method that one is tested against: the baseline in the same variant."""
        _, _, variant = self.comparison.methods[method]
        name = self.comparison.baseline
        whole = name if not variant else f"{name}-{variant}"
        return whole if name is not None and whole in self.comparison.methods and whole != method else None

    def folder(self, trial: Trial) -> Path:
        """Its run folder."""
        return self._runs(trial.cell) / trial.name

    def log(self, trial: Trial) -> Path:
        """What it has printed."""
        return self.out / "logs" / trial.cell.task / trial.cell.method / f"{trial.name}.log"

    def command(self, trial: Trial) -> list[str]:
        """The arguments of ``launch/train.py``."""
        return ["--config", self.comparison.tasks[trial.cell.task].config, *self._values(trial), "--resume", "auto"]

    def config(self, trial: Trial) -> Config:
        """By which it is run.

        Raises:
            UserError: naming arm, task and key.
        """
        if trial not in self._configs:
            task = self.comparison.tasks[trial.cell.task]
            try:
                self._configs[trial] = load_config(task.config, self._values(trial))
            except UserError as error:
                raise UserError(f"{trial.cell}: {error}") from None
        return self._configs[trial]

    def probe(self, cell: Cell) -> Trial:
        """A run of a cell whose config stands for all of its runs."""
        rates = self.rates(cell)
        return Trial(cell, "report", self.comparison.seeds[0], rates[0] if rates else None, self._known_steps())

    def check(self, *, leave_out: bool = False, runs: bool = True) -> None:
        """Check the configs of all cells before anything is run.

        Args:
            leave_out: go on without the cells that are refused, which then count as failed.
            runs: whether anything is to be run; else lengths are as they were.

        Raises:
            UserError: all that is wrong, in one line.
        """
        for cell in self.cells:
            try:
                config = self.config(self.probe(cell))
                if not config.task.has_dev:
                    raise UserError(f"{self.comparison.tasks[cell.task].config}: has no held-out set to compare on")
                if runs:
                    self._check_choice(config)
                    self._check_length(cell)
            except UserError as error:
                self.refused[cell] = str(error).removeprefix(f"{cell}: ")
        if self.refused and not leave_out:
            reasons: dict[str, list[Cell]] = {}
            for cell, reason in self.refused.items():
                reasons.setdefault(reason, []).append(cell)
            parts = [f"{_named(cells)}: {reason}" for reason, cells in reasons.items()]
            raise UserError(f"{'; '.join(parts)}; nothing has been run (--leave-out-refused goes on without them)")

    def _check_choice(self, config: Config) -> None:
        """Where one half of the held-out rows chooses, nothing is chosen by the other one, which is reported.

        Raises:
            UserError: naming the key.
        """
        train = config.train
        if self.is_halved and (train.keep == "best" or train.patience is not None):
            key = "train.keep=best" if train.keep == "best" else f"train.patience={train.patience}"
            remedy = "train.keep: last" if train.keep == "best" else "train.patience: null"
            raise UserError(
                f"{key} chooses by evaluations of the rows that are reported, and with tuning.half one half chooses "
                f"and the other is reported; set {remedy}"
            )

    def _check_length(self, cell: Cell) -> None:
        """What a method does in the middle of a run has to happen within as many steps as are known of.

        Raises:
            UserError: naming the key.
        """
        budget, config, note = self.comparison.budget, self.config(self.probe(cell)), ""
        steps = config.train.max_steps
        if budget is not None:
            steps = budget.steps_of(config.train.batch_size)
            if budget.seconds is not None:
                steps = budget.pilot_steps
                config = self.config(replace(self.probe(cell), purpose="pilot", steps=steps))
                note = f" (a pilot run for budget.seconds has budget.pilot_steps={steps} steps)"
        if steps is None:  # tokens, and epochs, are counted when the data are there
            return
        try:
            check_length(config, steps)
        except UserError as error:
            raise UserError(f"{error}{note}") from None

    def _known_steps(self) -> int | None:
        budget = self.comparison.budget
        return None if budget is None else (budget.steps or 1)

    def _runs(self, cell: Cell) -> Path:
        return self.out / "runs" / cell.task / cell.method

    def _values(self, trial: Trial) -> list[str]:
        """The overrides of a run, the later ones winning."""
        comparison, cell = self.comparison, trial.cell
        arm, _, variant = comparison.methods[cell.method]
        changes: dict[str, Any] = {**comparison.common, **comparison.tasks[cell.task].changes}
        changes |= comparison.variants.get(variant, {}) | arm.changes
        changes |= arm.by_variant.get(variant, {}) | arm.by_task.get(cell.task, {})
        own: dict[str, Any] = {}
        if trial.steps is not None:
            own |= {"train.epochs": None, "train.max_steps": trial.steps}
        if trial.lr is not None:
            own["train.lr"] = trial.lr
        if trial.purpose == "pilot":
            own |= {"train.eval_every": None, "train.keep": "last", "train.patience": None}
            every = self.config(self.probe(cell)).train.average_every
            if every is not None:  # often enough that a pilot meets the teacher, too
                own["train.average_every"] = min(every, max((trial.steps or 2) // 2, 1))
        elif self.is_halved:
            own["task.dataset.dev_half"] = "tuning" if trial.purpose == "tuning" else "report"
        own |= {"run.output_dir": str(self._runs(cell)), "run.name": trial.name, "run.seed": trial.seed}
        return [*as_overrides(changes), *self._overrides, *as_overrides(own)]


def _named(cells: Sequence[Cell]) -> str:
    """Some cells in few words."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    return f"{', '.join(methods)} on {', '.join(tasks)}"


def same_config(config: Config, written: Config, *, keys: Collection[str] | None = None) -> str | None:
    """What makes a run that is there another one than what is asked for, or None.

    Folders may have moved, and what is left to the run is filled in by it (:data:`FILLED_IN`).

    Args:
        keys: look at these alone, as ``section.key``.
    """
    ours, theirs = config.model_dump(mode="json"), written.model_dump(mode="json")
    for section, values in ours.items():
        for key, value in values.items():
            if keys is not None and f"{section}.{key}" not in keys:
                continue
            other = theirs[section][key]
            is_left_open = section == "task" and key in FILLED_IN and value == FILLED_IN[key]
            if key != "output_dir" and not is_left_open and value != other:
                return f"{section}.{key}={json.dumps(other)}, and it is now {json.dumps(value)}"
    return None
