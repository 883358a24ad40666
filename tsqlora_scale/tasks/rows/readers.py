"""Local files as Arrow tables: csv, tsv, json, jsonl (each also gzipped) and parquet.

The columns that a task reads become texts, exactly as written: an empty cell stays ``""`` and ``NA`` stays ``"NA"``;
what is no text is written as :mod:`tsqlora_scale.tasks.rows.cells` says. What a text means (a label, a number) is
decided once, in :mod:`tsqlora_scale.tasks.rows.label_cells`.
Every error names the file and the data row, counted from 1 without the header.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.tasks.rows import file_limits
from tsqlora_scale.tasks.rows.delimited_files import Quoting, Row, delimited_rows, header_and_rows
from tsqlora_scale.tasks.rows.json_files import json_rows
from tsqlora_scale.tasks.rows.parquet_files import parquet_tables
from tsqlora_scale.tasks.rows.wanted import Wanted, check_names, not_text


def read_tables(
    path: Path,
    wanted: Wanted,
    *,
    column_names: Sequence[str] | None = None,
    quoting: Quoting = "auto",
    keys: Sequence[str] | None = None,
    may_be_empty: bool = False,
) -> Iterator[pa.Table]:
    """The rows of one file, in order, as tables of one schema.

    Args:
        path: the file; its suffix decides the format.
        wanted: the columns to read.
        column_names: names of a csv/tsv file without a header row; ignored by formats that name their columns.
        quoting: what a quote means in csv and tsv files.
        keys: of all rows of a json file, where they are known: a column may then first appear anywhere.
        may_be_empty: of a csv or tsv file whether a header without rows will do.

    Raises:
        UserError: unknown format, wrong encoding, a missing column, or a malformed row.
    """
    kind = file_format(path)
    try:
        if kind == "parquet":
            yield from parquet_tables(path, wanted)
            return
        with _open(path) as file:
            if kind == "json":
                names, rows = json_rows(_lines(file, path, file_limits.MOST_IN_JSON), path, wanted, keys=keys)
            else:
                lines = _lines(file, path, file_limits.MOST_IN_A_LINE)
                fields = delimited_rows(lines, path, tabs=kind == "tsv", quoting=quoting)
                quotes = quoting == "double" or (quoting == "auto" and kind == "csv")
                present, rows = header_and_rows(fields, path, column_names, quotes=quotes)
                names, rows = _chosen(present, rows, wanted, path)
            yield from _tables(names, rows, path, may_be_empty=may_be_empty)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as {kind}: {error}; is it damaged, or of another format?") from None


def file_format(path: Path) -> str:
    """``csv``, ``tsv``, ``json`` (also for jsonl) or ``parquet``.

    Raises:
        UserError: any other suffix.
    """
    name = path.name.lower()
    zipped = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    kind = {".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(suffix)
    if kind is None or (zipped and kind == "parquet"):
        raise UserError(f"{path}: unknown format; use csv, tsv, json, jsonl (each also with .gz) or parquet")
    return kind


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _lines(file: BinaryIO, path: Path, most: int) -> Iterator[str]:
    """Decoded lines, ends kept. Split at ``\\n`` alone: other separators of Unicode occur inside sentences."""
    number = 0
    while raw := file.readline(most + 1):
        number += 1
        if len(raw) > most:
            raise UserError(f"{path}, line {number}: longer than {most >> 20} MiB; write one sample a line")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
            ) from None
        if "\0" in text:
            raise UserError(f"{path}, line {number}: holds a NUL byte; remove it, or save the file as UTF-8")
        yield text.removeprefix("\ufeff") if number == 1 else text


def _chosen(present: Sequence[str], rows: Iterator[Row], wanted: Wanted, path: Path) -> tuple[list[str], Iterator[Row]]:
    """The columns that are read, and their cells. The others need no name, as that of pandas' row numbers has none."""
    check_names(present, where=path)
    names = wanted.among(present, where=path)
    if wanted.others:
        names = [name for name in present if name.strip() or present.count(name) == 1]
        Wanted({name: name for name in names}).among(present, where=path)
    places = [present.index(name) for name in names]
    return names, rows if len(places) == len(present) else ([row[place] for place in places] for row in rows)


def _tables(names: list[str], rows: Iterator[Row], path: Path, *, may_be_empty: bool) -> Iterator[pa.Table]:
    schema = pa.schema([(name, pa.string()) for name in names])
    done = 0
    for chunk in _chunks(rows):
        try:
            yield pa.table([pa.array(c, pa.string()) for c in zip(*chunk, strict=True)], schema=schema)
        except UnicodeEncodeError:  # json can spell half a surrogate pair
            number = next(number for number, row in enumerate(chunk, done + 1) if not_text(row) is not None)
            raise UserError(f"{path}, row {number}: not valid text (half a surrogate pair); mend the row") from None
        done += len(chunk)
    if not done and may_be_empty:
        yield schema.empty_table()
    elif not done:
        raise UserError(f"{path}: the file holds no rows; it needs at least one")


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += sum(len(cell) for cell in row if cell is not None)
        if len(chunk) >= file_limits.CHUNK_ROWS or characters >= file_limits.CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
