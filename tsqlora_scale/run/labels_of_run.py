"""The classes that a saved adapter was trained on, for a config that goes on with it."""

from __future__ import annotations

from pathlib import Path

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import load_config
from tsqlora_scale.config.schema import Config
from tsqlora_scale.run.auto_words import check_found, found_before
from tsqlora_scale.run.trained_adapter import config_beside


def with_labels_of(config: Config, adapter: Path) -> Config:
    """The config with the classes of the run that a saved adapter lies in, where it names none itself; likewise with
    what that run's prompt was made of.

    Raises:
        UserError: that run's ``config.yaml`` is none, or has the classes in another order, or the words of a prompt are
            not known without it.
    """
    task = config.task
    if task.type != "classification":
        return config
    written = config_beside(adapter)
    if written is not None:
        run = load_config(written).task
        _check_order(task.labels, run.labels if run.type == task.type else None, written)
        if task.labels is None and (run.type, run.label) == (task.type, task.label):
            config = config.with_labels(run.labels)
        config = found_before(config, run.model_dump())
    if task.labels is None or task.prompt is not None:
        check_found(config)
    return config


def _check_order(labels: list[str] | int | None, trained: list[str] | int | None, written: Path) -> None:
    """See that classes that have names in common stand in the order in which a head was trained on them; quite other
    names count by their place.

    Raises:
        UserError: they do not.
    """
    if not isinstance(labels, list) or not isinstance(trained, list) or not set(labels) & set(trained):
        return
    if any(ours != theirs for ours, theirs in zip(labels, trained, strict=False)):
        raise UserError(
            f"task.labels={labels}: the adapter was trained on {trained} ({str(written)!r}), in this order; write them "
            "so, or leave task.labels out"
        )
