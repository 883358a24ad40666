"""The config of the look and its trials, and the lines by which a verdict is followed."""

from __future__ import annotations

from typing import Any

from tsqlora_scale.advice.pilot import ALONE, QUERY
from tsqlora_scale.config.schema import Config


def config_of_look(config: Config) -> Config:
    """The run as it is looked at: even draws, fixed ranks, nothing evaluated, and the query's rows in the pool."""
    config = config.for_audit()
    task = config.task.model_copy(update={"train_on_query": True})
    return config.model_copy(update={"task": task})


def config_lines(config: Config, way: str, *, steps: int) -> dict[str, Any]:
    """What of a run's config is to be set, and no more.

    Args:
        way: of the verdict.
        steps: of an even run as the config says.
    """
    if way == QUERY:
        chosen: dict[str, Any] = {"sampling": {"selector": "query", "keep_fraction": "auto"}}
        if config.train.epochs is not None:  # passes over S, whose size is found in the run
            chosen["train"] = {"epochs": None, "max_steps": steps}
        return chosen
    even: dict[str, Any] = {"selector": "full", "keep_fraction": "auto"}
    if config.sampling.file is not None:
        even["file"] = None
    if way != ALONE:
        return {"sampling": even}
    dataset: dict[str, Any] = {"train_file": config.task.query}
    if config.task.mixture:
        alone: dict[str, Any] = {"dataset": dataset, "mixture": [], "temperature": None, "query": None}
        return {"task": alone, "sampling": even}
    for key in ("name", "subset", "exclude", "weight", "id_column", "max_train_samples"):
        if getattr(config.task.dataset, key) is not None:  # of the pool, and not of the query's file
            dataset[key] = None
    return {"task": {"dataset": dataset, "query": None}, "sampling": even}
