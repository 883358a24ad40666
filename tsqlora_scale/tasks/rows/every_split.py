"""Checks that look at every split with the tokenizer, and leave rows out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import datasets
import numpy as np

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import printable
from tsqlora_scale.config.schema import DatasetConfig, TaskConfig
from tsqlora_scale.tasks.rows.data import Data
from tsqlora_scale.tasks.rows.set_columns import DATA_SET, SEPARATOR

log = logging.getLogger("tsqlora_scale")


#: Told the task (in a mixture with the ``dataset`` of the set alone), rows, and the words for where they come from.
Check = Callable[[TaskConfig, datasets.Dataset, str], datasets.Dataset]


def for_every_split(cfg: TaskConfig, data: Data, check: Check) -> Data:
    """The data with every split, and every set of a mixture, put through ``check``."""
    first, *_ = cfg.dev_sets or [""]
    sets = {name: rows for name, rows in {first: data.dev, **data.more_dev}.items() if rows is not None}
    for name, rows in sets.items():
        each = cfg.dev_sets[name][0] if name in cfg.dev_sets else None
        own = cfg if each is None else cfg.model_copy(update={"dataset": each.dataset})
        sets[name] = check(own, rows, f"the held-out set {name!r}" if name else _place(cfg.dataset, "dev_file"))
    train = _mixed_pool(cfg, data.train, check) if cfg.mixture and len(data.train) else None
    return dataclasses.replace(
        data,
        train=check(cfg, data.train, _place(cfg.dataset, "train_file")) if train is None else train,
        query=None if data.query is None else check(cfg, data.query, "task.query"),
        dev=sets.pop(first, None),
        more_dev=sets,
    )


def _mixed_pool(cfg: TaskConfig, pool: datasets.Dataset, check: Check) -> datasets.Dataset:
    """The pool of a mixture, whose sets lie one behind the other, each checked for itself."""
    numbers = pool.select_columns([DATA_SET]).with_format("arrow")[:][DATA_SET].to_numpy()
    ends = [0, *np.searchsorted(numbers, np.arange(len(cfg.mixture)), side="right").tolist()]
    parts = []
    for each, start, stop in zip(cfg.mixture, ends, ends[1:], strict=False):
        own = cfg.model_copy(update={"dataset": each.dataset})
        where = f"task.mixture, {each.name!r}: {_place(each.dataset, 'train_file')}"
        parts.append(check(own, pool.select(range(start, stop)), where))
    return pool if sum(map(len, parts)) == len(pool) else datasets.concatenate_datasets(parts)


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
    number = sample.rpartition(SEPARATOR)[2] if cfg.mixture else sample
    return f"row {int(number) + 1}" if cfg.dataset.id_column is None and number.isdigit() else f"sample {sample!r}"


def column_words(cfg: TaskConfig, name: str) -> str:
    """What the column ``name`` of the task is called in messages: a set of a mixture may call it otherwise."""
    return f"the column read as {name!r}" if cfg.mixture else f"column {name!r}"


def _place(dataset: DatasetConfig, key: str) -> str:
    """The words for where the rows of a split come from."""
    given = getattr(dataset, key)
    return given if isinstance(given, str) else dataset.name or f"the files of task.dataset.{key}"
