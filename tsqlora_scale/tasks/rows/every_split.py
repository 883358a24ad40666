"""Checks that look at every split with the tokenizer, and leave rows out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import datasets
import numpy as np

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import printable
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.rows.data import Data

log = logging.getLogger("tsqlora_scale")


def for_every_split(cfg: TaskConfig, data: Data, check: Callable[[datasets.Dataset, str], datasets.Dataset]) -> Data:
    """The data with every split put through ``check``, which is told the words for where its rows come from."""
    first, *_ = cfg.dataset.dev_sets or [""]
    sets = {name: rows for name, rows in {first: data.dev, **data.more_dev}.items() if rows is not None}
    for name, rows in sets.items():
        sets[name] = check(rows, f"the held-out set {name!r}" if name else _place(cfg, "dev_file"))
    return dataclasses.replace(
        data,
        train=check(data.train, _place(cfg, "train_file")),
        query=None if data.query is None else check(data.query, "task.query"),
        dev=sets.pop(first, None),
        more_dev=sets,
    )


def without(rows: datasets.Dataset, kept: np.ndarray, where: str, which: str, remedy: str) -> datasets.Dataset:
    """The rows that are ``kept`` (N,), and a warning of the others.

    Raises:
        UserError: none is.
    """
    if kept.all():
        return rows
    left_out = len(kept) - int(np.count_nonzero(kept))
    log.warning("%s: %d rows %s are left out", printable(where), left_out, which)
    if left_out == len(kept):
        raise UserError(f"{where}: every row is one {which}; {remedy}")
    return rows.select(np.flatnonzero(kept))


def sample_name(cfg: TaskConfig, sample: str) -> str:
    """What a row is called in messages, by its sample id."""
    return f"row {int(sample) + 1}" if cfg.dataset.id_column is None and sample.isdigit() else f"sample {sample!r}"


def _place(cfg: TaskConfig, key: str) -> str:
    """The words for where the rows of a split come from."""
    given = getattr(cfg.dataset, key)
    return given if isinstance(given, str) else cfg.dataset.name or f"the files of task.dataset.{key}"
