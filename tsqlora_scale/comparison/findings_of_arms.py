"""What the runs of a comparison say together: by task and method, only what is comparable."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.comparison.estimates import Estimate, mean_of, paired_p
from tsqlora_scale.comparison.trial_outcome import Outcome
from tsqlora_scale.comparison.trial_queue import TrialQueue
from tsqlora_scale.comparison.trials import Cell, TrialPlan

#: Phases of a run as tables have them, and those of the record that they are made of.
PHASES = {
    "training": ("warmup", "training"),
    "scoring": ("scoring",),
    "resizing": ("resizing",),
    "evaluation": ("evaluation",),
    "other": ("load", "checkpointing"),
}
#: Keys of ``task.dataset`` that are of the pool alone.
OF_THE_POOL = ("train_file", "train_split", "max_train_samples", "exclude", "weight", "id_column")
#: Keys beside it that say what rows hold.
CONTENTS = tuple(
    f"task.{name}"
    for name in (
        *("mixture", "text", "label", "labels", "source", "target", "input", "prefix"),
        *("messages", "tools", "completion", "system", "demonstrations"),
    )
)


def seconds_of(result: dict[str, Any], phase: str) -> float:
    """Wall seconds of one of :data:`PHASES` in a ``result.json``. What a run has learned from plain text before
    (``pretrain``) is training, too."""
    before = (result.get("pretraining") or {}).get("seconds", 0.0) if phase == "training" else 0.0
    return float(before + sum(result["seconds"].get(part, 0.0) for part in PHASES[phase]))


@dataclass(frozen=True)
class MethodRuns:
    """The finished runs of a method on a task, by seed, and the learning rate that they have in common."""

    method: str
    runs: dict[int, dict[str, Any]]
    lr: float

    def values(self, metric: str, seeds: Iterable[int] | None = None) -> list[float]:
        """Of a metric, in the order of the seeds."""
        return [float(self.runs[seed]["metrics"][metric]) for seed in (self.runs if seeds is None else seeds)]

    def median(self, key: str) -> float:
        """Of a number of ``result.json``."""
        return float(np.median([run[key] for run in self.runs.values()]))

    def seconds(self, phase: str) -> float:
        """Median wall seconds of one of :data:`PHASES`."""
        return float(np.median([seconds_of(run, phase) for run in self.runs.values()]))

    @property
    def peak_bytes(self) -> int:
        """Median of the highest peak of any rank."""
        return int(np.median([max(run["peak_memory_bytes"]) for run in self.runs.values()]))


@dataclass(frozen=True)
class TaskTable:
    """What one table shows: runs on one task, one model, one code, and alike data.

    Attributes:
        identity: what they have in common, as ``result.json`` has it.
        titles: of the metrics, by name.
    """

    task: str
    identity: dict[str, Any]
    methods: dict[str, MethodRuns]
    titles: dict[str, str]

    @property
    def metrics(self) -> list[str]:
        """Their names, the deciding one first."""
        decides = self.identity["task"]["decides"]
        return [decides, *(name for name in self.titles if name != decides)]

    def difference(self, method: str, baseline: str | None) -> tuple[Estimate, float] | None:
        """Mean paired difference of the deciding metric to the baseline's over the seeds that both have, and its p."""
        if baseline is None or baseline not in self.methods or method not in self.methods:
            return None
        ours, theirs = self.methods[method], self.methods[baseline]
        seeds = [seed for seed in ours.runs if seed in theirs.runs]
        if not seeds:
            return None
        metric = self.metrics[0]
        pairs = zip(ours.values(metric, seeds), theirs.values(metric, seeds), strict=True)
        differences = [one - other for one, other in pairs]
        return mean_of(differences), paired_p(differences)


@dataclass(frozen=True)
class Found:
    """Everything that tables are made of."""

    trials: TrialPlan
    tables: list[TaskTable]
    #: What has failed, and why.
    failures: dict[str, str]
    #: What has not been run.
    missing: list[str] = field(default_factory=list)
    #: Run folders by task, method and seed.
    folders: dict[tuple[str, str, int], Path] = field(default_factory=dict)


def gather(queue: TrialQueue) -> Found:
    """Read what is there.

    Raises:
        UserError: two runs that one table would show have other data.
    """
    failures: dict[str, str] = {str(cell): reason for cell, reason in queue.trials.refused.items()}
    missing: list[str] = []
    finished: dict[str, list[Outcome]] = {}
    for cell in queue.trials.cells:
        if cell in queue.trials.refused:
            continue
        found = _of_cell(queue, cell, failures, missing)
        finished.setdefault(cell.task, []).extend(found)
    tables = [table for task, outcomes in finished.items() for table in _tables(queue.trials, task, outcomes)]
    folders = {
        (each.trial.cell.task, each.trial.cell.method, each.trial.seed): queue.trials.folder(each.trial)
        for outcomes in finished.values()
        for each in outcomes
    }
    return Found(queue.trials, tables, failures, missing, folders)


def _of_cell(queue: TrialQueue, cell: Cell, failures: dict[str, str], missing: list[str]) -> list[Outcome]:
    """A cell's finished runs; what else there is to say goes into the other two."""
    queue.give_up(cell)
    for trial in queue.of_cell(cell):
        outcome = queue.outcome(trial)
        if outcome.result is None:
            reason = queue.failed.get(trial) or outcome.failure
            if reason is not None:
                failures[str(trial)] = reason
            else:
                missing.append(str(trial))
    try:
        outcomes = [queue.outcome(trial) for trial in queue.reported(cell)]
    except LookupError:
        if cell in queue.spent:
            failures[str(cell)] = queue.spent[cell]
        elif not any(str(trial) in failures or str(trial) in missing for trial in queue.of_cell(cell)):
            missing.append(str(cell))
        return []
    return [outcome for outcome in outcomes if outcome.result is not None]


def _tables(trials: TrialPlan, task: str, outcomes: Sequence[Outcome]) -> list[TaskTable]:
    """One table for every model and every state of the code, or states one after the other where runs went on with
    other code: a table never mixes them."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(_same(outcome), []).append(outcome)
    tables = []
    for group in groups.values():
        check_data(trials, group)
        methods: dict[str, MethodRuns] = {}
        for outcome in group:
            assert outcome.result is not None
            config = trials.config(outcome.trial)
            name = outcome.trial.cell.method
            runs = methods.setdefault(name, MethodRuns(name, {}, config.train.lr)).runs
            runs[outcome.trial.seed] = outcome.result
        first = group[0].result
        assert first is not None
        titles = {name: first.get("metric_titles", {}).get(name, name) for name in first["metrics"]}
        order = {name: methods[name] for name in trials.comparison.methods if name in methods}
        tables.append(TaskTable(task, {key: first[key] for key in ("task", "model", "code")}, order, titles))
    return tables


def _same(outcome: Outcome) -> str:
    """What runs of one table have in common."""
    result = outcome.result
    assert result is not None
    missing = [key for key in ("task", "model", "data", "code") if not isinstance(result.get(key), dict)]
    if missing:
        raise UserError(f"{outcome.trial}: its result.json does not say which {missing[0]}; run it again")
    decides = {key: result["task"].get(key) for key in ("type", "metrics", "decides")}
    return json.dumps([decides, result["model"], result["code"]], sort_keys=True)


def _says_rows_of(split: str, key: str) -> bool:
    """Whether a config's key says which rows there are of a split, ``train`` or ``dev``, or what they hold."""
    other = {"train": ("dev_file", "dev_split", "max_dev_samples", "dev_half"), "dev": OF_THE_POOL}[split]
    section, _, name = key.removeprefix("task.").partition(".")
    if section == "dataset":
        return name not in other
    return key in CONTENTS


def check_data(trials: TrialPlan, outcomes: Sequence[Outcome]) -> None:
    """Runs of a table are of the same data: of every seed the same rows, of all where none draws a part. Variants that
    set keys of the data have each their own.

    Raises:
        UserError: naming two runs.
    """
    seen: dict[str, tuple[Outcome, str]] = {}
    for outcome in outcomes:
        assert outcome.result is not None
        config = trials.config(outcome.trial)
        task, seed = config.task, outcome.trial.seed
        own_query = json.dumps([task.query, task.train_on_query])  # its rows may be among those trained on
        _, _, variant = trials.comparison.methods[outcome.trial.cell.method]
        changes = trials.comparison.variants.get(variant, {})
        drawn = {
            "train": any(each.max_train_samples is not None for each in task.datasets),
            "dev": any(each.max_dev_samples is not None for each in task.datasets),
        }
        for split, is_part in drawn.items():
            digest = str(outcome.result["data"][split])
            own_data = json.dumps({name: value for name, value in changes.items() if _says_rows_of(split, name)})
            key = f"{split} {own_data} {own_query if split == 'train' else ''} {seed if is_part else ''}"
            other, first = seen.setdefault(key, (outcome, digest))
            if first != digest:
                what = "training" if split == "train" else "held-out"
                raise UserError(
                    f"{outcome.trial} has other {what} rows than {other.trial} "
                    f"({digest[:12]}, {first[:12]}): no table shows both; remove the folder of the one that is wrong "
                    f"({trials.folder(outcome.trial)}, {trials.folder(other.trial)})"
                )
