"""Local files as Arrow tables: csv, tsv, json, jsonl (each also gzipped) and parquet.

Text formats give string columns only, exactly as written: an empty cell stays ``""`` and ``NA`` stays ``"NA"``.
What a string means (a label, a number) is decided once, in :mod:`tsqlora_scale.tasks.columns`.
Every error names the file and the data row, counted from 1 without the header.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from tsqlora_scale.errors import UserError

#: Rows per Arrow table; bounds the memory of a conversion, not the size of a file.
CHUNK_ROWS = 10_000

Row = list[str | None]


def read_tables(path: Path, *, column_names: Sequence[str] | None, text_columns: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of one file, in order, as tables of one schema.

    Args:
        path: the file; its suffix decides the format.
        column_names: names of a csv/tsv file without a header row; ignored by formats that name their columns.
        text_columns: columns that must hold plain values in json files (others may be nested, and become json text).

    Raises:
        UserError: unknown format, wrong encoding, or a malformed row.
    """
    kind = file_format(path)
    try:
        if kind == "parquet":
            yield from _parquet(path)
            return
        with _open(path) as file:
            if kind == "json":
                names, rows = _json(file, path, text_columns)
            else:
                read = _tsv_rows if kind == "tsv" else _csv_rows
                names, rows = _delimited(read(_lines(file, path), path), path, column_names)
            yield from _tables(names, rows, path)
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


def _lines(file: BinaryIO, path: Path) -> Iterator[str]:
    """Decoded lines, ends kept. Split at ``\\n`` alone: other separators of Unicode occur inside sentences."""
    for number, raw in enumerate(file, 1):
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
            ) from None
        yield text.removeprefix("\ufeff") if number == 1 else text


def _tsv_rows(lines: Iterator[str], path: Path) -> Iterator[list[str]]:
    """GLUE's convention: a tab always separates, and a quote is a character like any other."""
    for line in lines:
        line = line.rstrip("\r\n")
        if line:
            yield line.split("\t")


def _csv_rows(lines: Iterator[str], path: Path) -> Iterator[list[str]]:
    """RFC 4180. Strict: otherwise one unbalanced quote swallows the rows up to the next."""
    reader = csv.reader(lines, strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # the default refuses documents of more than 131,072 characters
    try:
        yield from (row for row in reader if row)
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: {error}; quote fields that hold a quote and double the quote inside, "
            "or save the file as tsv, where quotes have no meaning"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _delimited(
    rows: Iterator[list[str]], path: Path, column_names: Sequence[str] | None
) -> tuple[list[str], Iterator[Row]]:
    names = list(column_names) if column_names else next(rows, None)
    if names is None:
        raise UserError(f"{path}: the file is empty; it needs a header and at least one row")
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UserError(f"{path}: the header names column {twice[0]!r} twice; rename one")
    origin = "task.dataset.column_names gives" if column_names else "the header has"

    def checked() -> Iterator[Row]:
        for number, row in enumerate(rows, 1):
            if len(row) != len(names):
                raise UserError(
                    f"{path}, row {number}: {len(row)} fields where {origin} {len(names)} ({', '.join(names)}); "
                    "mend the row, or check the separator and task.dataset.column_names"
                )
            yield cast(Row, row)

    return names, checked()


def _json(file: BinaryIO, path: Path, text_columns: Sequence[str]) -> tuple[list[str], Iterator[Row]]:
    """One object a line, or one array of objects. The columns are the keys of the first rows."""
    records = _json_records(_lines(file, path), path)
    head = list(itertools.islice(records, CHUNK_ROWS))
    if not head:
        raise UserError(f"{path}: the file is empty; it needs at least one row")
    names = list(dict.fromkeys(key for record in head for key in record))

    def rows() -> Iterator[Row]:
        for number, record in enumerate(itertools.chain(head, records), 1):
            for name in text_columns:
                if isinstance(record.get(name), list | dict):
                    kind = "list" if isinstance(record[name], list) else "object"
                    raise UserError(f"{path}, row {number}: column {name!r} holds a {kind}; it must hold plain text")
            yield [_json_text(record.get(name)) for name in names]

    return names, rows()


def _json_records(lines: Iterator[str], path: Path) -> Iterator[dict[str, Any]]:
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("["):
        records = iter(_loads(first + "".join(lines), path, ""))
    else:
        filled = (line for line in itertools.chain([first], lines) if line.strip())
        records = (_loads(line, path, f", row {number}") for number, line in enumerate(filled, 1))
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f"{path}, row {number}: {str(record)[:40]!r} is not an object of column names and values")
        yield record


def _loads(text: str, path: Path, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}{where}: not valid JSON ({error}); write one object a line, or one array") from None


def _json_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _parquet(path: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=CHUNK_ROWS):
            yield pa.Table.from_batches([batch])


def _tables(names: list[str], rows: Iterator[Row], path: Path) -> Iterator[pa.Table]:
    schema = pa.schema([(name, pa.string()) for name in names])
    done = 0
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        try:
            yield pa.table([pa.array(c, pa.string()) for c in zip(*chunk, strict=True)], schema=schema)
        except UnicodeEncodeError as error:  # json can spell half a surrogate pair
            raise UserError(
                f"{path}, rows {done + 1} to {done + len(chunk)}: not valid text ({error.reason})"
            ) from None
        done += len(chunk)
    if not done:
        raise UserError(f"{path}: the file holds no rows; it needs at least one")
