"""The texts that a pretraining learns from: of a file, or the task's own, as often as they are masked differently."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import ceil
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pyarrow as pa

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.random_streams import philox
from tsqlora_scale.config.schema import Config
from tsqlora_scale.tasks.rows.column_checks import SAMPLE_ID
from tsqlora_scale.tasks.rows.data import Data
from tsqlora_scale.tasks.rows.loading import load_data
from tsqlora_scale.tasks.rows.row_ids import made_column

if TYPE_CHECKING:
    from tsqlora_scale.tasks.task import Task

#: The column of the number by which a row's own masks are drawn.
MASK_STREAM = "mask_stream"
#: Most times that a text is in the pool, each with masks of its own (BERT was pretrained on ten).
COPIES = 10
#: The share of the texts that is held out, and the most of them.
HELD_OUT, MOST_HELD_OUT = 0.1, 256
#: Rows of the task that are in memory at once.
ROWS = 2**12


def corpus_data(config: Config, own: Task | None) -> Data:
    """Pool and held-out texts of a pretraining.

    Args:
        config: of the pretraining's own run.
        own: the task that comes after it, whose training texts are learned: all that a sample has of them, in lines, a
            target too; none: the config names a file.

    Raises:
        UserError: as for any file of texts; or too few texts.
    """
    task, train, seed = config.task, config.train, config.run.seed
    column = str(task.source)
    table, source = _of_file(config, column) if own is None else (_of_task(own, column), own.digest())
    if len(table) < 2:
        raise UserError(f"a corpus of {len(table)} texts is none; give pretrain.file more, or leave pretraining out")
    order = philox(seed, "corpus").permutation(len(table))
    count = max(1, min(MOST_HELD_OUT, int(HELD_OUT * len(table))))
    apart = np.sort(order[:count])
    held_out, learned = table.take(apart), _without(table, apart)
    copies = max(1, min(COPIES, ceil((train.max_steps or 1) * train.batch_size / len(learned))))
    return Data(
        _masked(learned, seed, "masks", copies, source=source),
        _masked(held_out, seed, "held-out masks", 1, source=source),
    )


def _of_file(config: Config, column: str) -> tuple[pa.Table, str]:
    """Texts and ids, and what says which they are."""
    pool = load_data(config.task, seed=config.run.seed).train
    table: pa.Table = pool.with_format("arrow")[:]
    return table.select([column, SAMPLE_ID]), f"{pool._fingerprint} {column}"


def _of_task(own: Task, column: str) -> pa.Table:
    def texts() -> Iterator[pa.Array]:
        for start in range(0, len(own), ROWS):
            rows = range(start, min(start + ROWS, len(own)))
            lines = ("\n".join(text for text in parts if text.strip()) for parts in own.texts(rows))
            yield pa.array(lines, pa.string())

    found = made_column(texts(), own.train.data.nbytes)
    return pa.table({column: found, SAMPLE_ID: list(own.sample_ids)})


def _without(table: pa.Table, apart: np.ndarray) -> pa.Table:
    """The table but for some rows, in order, as parts of it: a file's texts stay where they lie on disk."""
    begins, ends = [0, *(apart + 1).tolist()], [*apart.tolist(), len(table)]
    parts = [table.slice(begin, end - begin) for begin, end in zip(begins, ends, strict=True) if begin < end]
    return pa.concat_tables(parts)


def _masked(table: pa.Table, seed: int, stream: str, copies: int, *, source: str) -> datasets.Dataset:
    """``copies`` of the rows, one behind the other; the texts themselves are there once.

    Args:
        source: what says which texts there are. With seed, stream and copies it makes the fingerprint: one that is
            taken of the table would write all of it for every one of its parts.
    """
    parts = []
    for number in range(copies):
        streams = philox(seed, stream, number).integers(2**62, size=len(table))
        ids = table[SAMPLE_ID] if not number else pa.array([f"{one}/{number}" for one in table[SAMPLE_ID].to_pylist()])
        part = table.set_column(table.column_names.index(SAMPLE_ID), SAMPLE_ID, ids)
        parts.append(part.append_column(MASK_STREAM, pa.array(streams)))
    whole = pa.concat_tables(parts, promote_options="permissive")
    identity = repr((source, seed, stream, copies, len(table)))
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return datasets.Dataset(datasets.table.InMemoryTable(whole), fingerprint=fingerprint)
