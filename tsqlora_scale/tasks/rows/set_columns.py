"""The rows of one data set of a mixture, with the columns of the task, and where they are from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsqlora_scale.common.disk_arrays import blocks, filled
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.rows.column_checks import SAMPLE_ID
from tsqlora_scale.tasks.rows.row_ids import made_column
from tsqlora_scale.tasks.rows.wanted import (
    INPUT_KEY,
    MESSAGES_KEY,
    SOURCE_KEY,
    TARGET_KEY,
    text_columns,
)

#: Columns of ours that a mixture's pool has beside :data:`.SAMPLE_ID`: the number of the set that a row is from, and
#: what multiplies how often it is drawn among the rows of that set (only where one of the sets says so).
DATA_SET, ROW_WEIGHT = "data_set", "row_weight"
#: Between the name of a set and the id of a row in it.
SEPARATOR = "/"
Column: TypeAlias = pa.ChunkedArray | pa.Array | np.ndarray


@dataclass(frozen=True)
class SetColumns:
    """How the columns of one set become the mixture's.

    Attributes:
        task: the mixture's.
        name: of the set.
        number: of the set, from 0.
        prefix: of the set's sources.
        is_pool: whether these are rows of the pool, that are to know where they are from.
    """

    task: TaskConfig
    name: str
    number: int
    prefix: str
    is_pool: bool

    @property
    def identity(self) -> str:
        """What the columns depend on beside those of the set."""
        return repr((self.name, self.number, self.prefix, self.is_pool, text_columns(self.task), self.task.label))

    def own_ids(self, ids: pa.Array) -> pa.Array | None:
        """Of a list of samples to leave out those that may be the set's, by their ids in it; None without any.

        A list may name samples as the mixture does, by the name of their set, and then hold those of other sets, too.
        """
        ours, *others = (f"{name}{SEPARATOR}" for name in (self.name, *self._other_names()))
        found = [
            text.lstrip().removeprefix(ours) if text.lstrip().startswith(ours) else text
            for text in ids.to_pylist()
            if not text.lstrip().startswith(tuple(others))
        ]
        return pa.array(list(dict.fromkeys(found)), pa.string()) if found else None

    def _other_names(self) -> list[str]:
        return [each.name for each in self.task.mixture if each.name != self.name]

    def columns(
        self,
        texts: Mapping[str, pa.ChunkedArray],
        ids: pa.ChunkedArray | pa.Array,
        weights: np.ndarray | None,
        answers: Column | None,
    ) -> dict[str, Column]:
        """The columns (N,) of all rows of the set, by their names in the mixture, in the order that every set has.

        Args:
            texts: the set's own columns by the key that names them.
            ids: of the rows in their own set.
            weights: of the rows.
            answers: classes or numbers of the rows, of a task that has such.
        """
        size = len(ids)
        found: dict[str, Column] = {SAMPLE_ID: self._named(ids) if self.is_pool else as_column(ids)}
        for key, name in text_columns(self.task).items():
            if key == MESSAGES_KEY and key not in texts:
                found[name] = exchanges(texts[SOURCE_KEY], texts.get(INPUT_KEY), texts[TARGET_KEY], prefix=self.prefix)
            elif key not in texts:
                found[name] = pa.chunked_array([pa.nulls(size, pa.string())])
            elif key == SOURCE_KEY and self.prefix:
                found[name] = _joined(texts[key], self.prefix)
            else:
                found[name] = as_column(texts[key])
        if answers is not None:
            assert self.task.label is not None, "the config requires one"
            found[self.task.label] = answers
        if self.is_pool:
            found[DATA_SET] = filled(size, np.int16, self.number)
            if any(each.dataset.weight is not None for each in self.task.mixture):
                found[ROW_WEIGHT] = filled(size, np.float64, 1.0) if weights is None else weights
        return found

    def _named(self, ids: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray:
        return _joined(as_column(ids), f"{self.name}{SEPARATOR}")


def as_column(texts: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray:
    """Texts (N,) of any width as those of 32-bit offsets, which the sets must have alike."""
    column = texts if isinstance(texts, pa.ChunkedArray) else pa.chunked_array([texts])
    if column.type == pa.string():
        return column
    return made_column((part.cast(pa.string()) for part in _parts(column)), column.nbytes)


def exchanges(
    sources: pa.ChunkedArray, inputs: pa.ChunkedArray | None, targets: pa.ChunkedArray, *, prefix: str = ""
) -> pa.ChunkedArray:
    """Conversations of one question and its answer, (N,) JSON, of texts: an input follows the source after a blank
    line where it is not empty, as in a task of texts."""

    def cells() -> Iterator[pa.Array]:
        for block in blocks(len(sources), 2**14):
            count = block.stop - block.start
            given = [None] * count if inputs is None else inputs.slice(block.start, count).to_pylist()
            both = zip(*(column.slice(block.start, count).to_pylist() for column in (sources, targets)), strict=True)
            yield pa.array(
                [_exchange(prefix, source, more, target) for (source, target), more in zip(both, given, strict=True)],
                pa.string(),
            )

    return made_column(cells(), sources.nbytes + targets.nbytes + (0 if inputs is None else inputs.nbytes))


def _exchange(prefix: str, source: str | None, more: str | None, target: str | None) -> str:
    asked = prefix + (source or "") + (f"\n\n{more}" if more and more.strip() else "")
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": target or ""}]
    return json.dumps(turns, ensure_ascii=False)


def _joined(column: pa.ChunkedArray, before: str) -> pa.ChunkedArray:
    """The texts with another before each; a missing one stays so."""
    parts = (pc.binary_join_element_wise(before, part.cast(pa.string()), "") for part in _parts(column))
    return made_column(parts, column.nbytes + len(column) * len(before.encode()))


def _parts(column: pa.ChunkedArray) -> Iterator[pa.Array]:
    for block in blocks(len(column), 2**16):
        yield from column.slice(block.start, block.stop - block.start).chunks
