"""Answers beside the rows that they are of, as csv, tsv, jsonl or parquet: in order, block by block, whole or not."""

from __future__ import annotations

import csv
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.files import WRITE_ERRORS, written_whole
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.rows.given_rows import TableBlocks, given_records, given_tables

log = logging.getLogger("tsqlora_scale")

ANSWER = "prediction"


class PredictionWriter(Protocol):
    """Where the answers of one file's rows go."""

    def write(self, answers: pa.Table) -> None:
        """Answers of the next rows, in the file's order."""


def answer_names(labels: Sequence[str] | int | None, *, probabilities: bool) -> list[str]:
    """The columns that are added to those of the file.

    Args:
        labels: ``task.labels``.
        probabilities: whether there is one of every class.
    """
    classes = range(labels) if isinstance(labels, int) else labels or []
    return [ANSWER, *(f"probability_{name}" for name in classes if probabilities)]


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Say of what a disk does not take inside that it is ``out``.

    Raises:
        UserError: it cannot be written.
    """
    try:
        yield
    except WRITE_ERRORS as error:
        raise UserError(f"--out {str(out)!r} cannot be written ({error}); choose another place") from None


@contextmanager
def prediction_writer(out: Path, data: Path, cfg: TaskConfig) -> Iterator[PredictionWriter]:
    """A writer to ``out`` of the answers to the rows of ``data``; ``out`` appears when all is done."""
    kind = out.suffix.lower()
    with written_whole(out) as partial:
        if kind == ".parquet":
            with _Parquet(partial, TableBlocks(given_tables(data, cfg))) as writer:
                yield writer
            return
        with partial.open("w", encoding="utf-8", newline="") as file:
            if kind == ".jsonl":
                yield _Lines(file, given_records(data, cfg))
            else:
                yield (_Tabs if kind == ".tsv" else _Commas)(file, TableBlocks(given_tables(data, cfg)))


class _Parquet:
    """The file's own types, and ours."""

    def __init__(self, path: Path, rows: TableBlocks) -> None:
        self._path, self._rows = path, rows
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> _Parquet:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, answers: pa.Table) -> None:
        table = self._rows.take(len(answers))
        pandas = {b"pandas": table.schema.metadata[b"pandas"]} if b"pandas" in (table.schema.metadata or {}) else None
        for name in answers.column_names:
            table = table.append_column(answers.field(name), answers[name])
        table = table.replace_schema_metadata(pandas)  # what datasets writes there knows nothing of new columns
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)


class _Lines:
    """An object a line."""

    def __init__(self, file: Any, rows: Iterator[dict[str, Any]]) -> None:
        self._file, self._rows = file, rows

    def write(self, answers: pa.Table) -> None:
        for record, own in zip(itertools.islice(self._rows, len(answers)), _plain(answers).to_pylist(), strict=True):
            try:
                self._file.write(json.dumps(record | own, ensure_ascii=False, default=str) + "\n")
            except UnicodeEncodeError:  # half of a surrogate pair, in a column that nobody reads: as it was written
                self._file.write(json.dumps(record | own, default=str) + "\n")


class _Commas:
    """RFC 4180."""

    def __init__(self, file: Any, rows: TableBlocks) -> None:
        self._file, self._rows = file, rows
        self._has_header = False
        self._writer: Any = csv.writer(file, lineterminator="\n")
        self._quoting: Any = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def write(self, answers: pa.Table) -> None:
        table, own = self._rows.take(len(answers)), _plain(answers)
        if not self._has_header:
            self._line([*table.column_names, *own.column_names])
            self._has_header = True
        for row, answer in zip(table.to_pylist(), own.to_pylist(), strict=True):
            self._line([_cell(value) for value in [*row.values(), *answer.values()]])

    def _line(self, cells: list[str]) -> None:
        # a carriage return alone is a line's end to some readers, and no reason for quotes to the writer
        writer = self._quoting if any("\r" in cell for cell in cells) else self._writer
        writer.writerow(cells)


class _Tabs(_Commas):
    """GLUE's convention, as it is read: a quote is a character like any other, and no cell holds a tab or a line end.

    In the place of those stands a blank.
    """

    _warned = False

    def _line(self, cells: list[str]) -> None:
        clean = [cell.translate({9: " ", 10: " ", 13: " "}) for cell in cells]
        if clean != cells and not self._warned:
            log.warning("a tsv file holds no tabs and line ends inside of a cell; blanks stand for them")
            self._warned = True
        self._file.write("\t".join(clean) + "\n")


def _plain(answers: pa.Table) -> pa.Table:
    """float32 as the shortest decimal number that reads back as the same."""
    for place, field in enumerate(answers.schema):
        if pa.types.is_float32(field.type):
            short = [None if value is None else float(str(value)) for value in _float32(answers[field.name])]
            answers = answers.set_column(place, field.name, pa.array(short, pa.float64()))
    return answers


def _float32(column: pa.ChunkedArray) -> list[Any]:
    numbers = column.combine_chunks().fill_null(0.0).to_numpy(zero_copy_only=False)
    return [number if valid else None for number, valid in zip(numbers, column.is_valid().to_pylist(), strict=True)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
