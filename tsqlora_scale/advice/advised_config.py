"""The config of the look and its trials, and the lines by which a verdict is followed."""

from __future__ import annotations

from typing import Any

from tsqlora_scale.advice.pilot import ALONE, QUERY
from tsqlora_scale.advice.verdict import Verdict
from tsqlora_scale.config.schema import Config
from tsqlora_scale.config.task_section import SET_COLUMNS


def config_of_look(config: Config) -> Config:
    """The run as it is looked at: even draws, fixed ranks, nothing evaluated, and the query's rows in the pool."""
    config = config.for_audit()
    task = config.task.model_copy(update={"train_on_query": True})
    return config.model_copy(update={"task": task})


def config_lines(
    config: Config, verdict: Verdict, *, steps: int, labels: list[str] | int | None = None
) -> dict[str, Any]:
    """What of a run's config is to be set, and no more.

    Args:
        steps: of an even run as the config says.
        labels: the classes of the pool, where the config leaves them to the data; None: there are none.
    """
    way = verdict.way
    lines: dict[str, Any] = {"sampling": {"selector": QUERY if way == QUERY else "full", "keep_fraction": "auto"}}
    if config.sampling.file is not None:
        lines["sampling"]["file"] = None
    if way in (QUERY, ALONE) and config.train.epochs is not None:  # passes over what is not the pool any more
        lines["train"] = {"epochs": None, "max_steps": steps}
    if config.task.train_on_query and not verdict.joins_query:
        lines = {"task": {"train_on_query": False}, **lines}
    if way != ALONE:
        return lines
    dataset: dict[str, Any] = {"train_file": config.task.query}
    lines = {"task": {"dataset": dataset, "query": None}, **lines}
    if config.task.mixture:
        lines["task"] |= {"mixture": [], "temperature": None}
        # of the query, which may be named in the sets alone
        lines["task"] |= {key: found for key in SET_COLUMNS if (found := getattr(config.task, key))}
    else:
        for key in ("name", "subset", "exclude", "weight", "id_column", "max_train_samples"):
            if getattr(config.task.dataset, key) is not None:  # of the pool, and not of the query's file
                dataset[key] = None
    if config.task.labels is None and labels is not None:  # a query may lack some
        lines["task"]["labels"] = labels
    if loses_held_out(config):
        usual: dict[str, Any] = {"eval_every": None, "patience": None, "keep": "last"}
        changed: dict[str, Any] = {key: value for key, value in usual.items() if getattr(config.train, key) != value}
        if config.train.keep == "average":  # needs no evaluation
            changed.pop("keep")
        if "eval_every" in changed and config.train.average_last:  # which snapshots else follow
            changed["average_every"] = config.train.average_every
        if changed:
            lines["train"] = lines.get("train", {}) | changed
    return lines


def loses_held_out(config: Config) -> bool:
    """Whether a config that trains on the query's file has no more use for the held-out rows: a hub's splits, and the
    sets of a mixture, come with the pool."""
    return config.task.has_dev and (bool(config.task.mixture) or config.task.dataset.name is not None)
