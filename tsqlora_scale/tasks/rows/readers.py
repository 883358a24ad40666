"""Local files as Arrow tables: csv, tsv, json, jsonl (each also gzipped) and parquet.

Text formats give string columns only, exactly as written: an empty cell stays ``""`` and ``NA`` stays ``"NA"``.
What a string means (a label, a number) is decided once, in :mod:`tsqlora_scale.tasks.rows.label_cells`.
Every error names the file and the data row, counted from 1 without the header.
"""

from __future__ import annotations

import collections
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

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown

#: Rows and characters of an Arrow table, about: they bound the memory of a conversion, not the size of a file.
CHUNK_ROWS = 10_000
CHUNK_CHARACTERS = 2**26
#: Bytes of a line of a csv or tsv file, and of json, where a line may be a whole array.
MOST_IN_A_LINE = 2**26
MOST_IN_JSON = 2**30

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
                names, rows = _json(_lines(file, path, MOST_IN_JSON), path, text_columns)
            else:
                read = _tsv_rows if kind == "tsv" else _csv_rows
                names, rows = _delimited(read(_lines(file, path, MOST_IN_A_LINE), path), path, column_names)
            _check_names(names, path)
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


def _tsv_rows(lines: Iterator[str], path: Path) -> Iterator[list[str]]:
    """GLUE's convention: a tab always separates, and a quote is a character like any other."""
    for line in lines:
        line = line.rstrip("\r\n")
        if line:
            yield line.split("\t")


def _csv_rows(lines: Iterator[str], path: Path) -> Iterator[list[str]]:
    """RFC 4180. Strict: otherwise one unbalanced quote swallows the rows up to the next."""
    reader = csv.reader(lines, strict=True)
    limit = csv.field_size_limit(MOST_IN_A_LINE)  # the default refuses documents of more than 131,072 characters
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
    if any("\r" in name for name in names):
        raise UserError(f"{path}: a carriage return inside the header; save the file with \\n as line end")
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


def _check_names(names: Sequence[str], path: Path) -> None:
    twice = next((name for name, count in collections.Counter(names).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{path}: the column {twice!r} is there twice; rename one")
    if not names:
        raise UserError(f"{path}: has no columns; give a file with a column for each key of task")
    bad = _not_text(names)
    if bad is not None:
        raise UserError(f"{path}: the name of column {bad!r} is not valid text; rename it")
    cut = next((name for name in names if "\0" in name), None)  # where Arrow ends it, and two names may be one
    if cut is not None:
        raise UserError(f"{path}: the name of column {cut!r} holds a NUL character; rename it")


def _json(lines: Iterator[str], path: Path, text_columns: Sequence[str]) -> tuple[list[str], Iterator[Row]]:
    """One object a line, or one array of objects. The columns are the keys of the first rows; no later row has more."""
    records = _json_records(lines, path)
    head: list[dict[str, Any]] = []
    characters = 0
    for record, length in records:
        head.append(record)
        characters += length
        if len(head) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            break
    if not head:
        raise UserError(f"{path}: the file is empty; it needs at least one row")
    names = list(dict.fromkeys(key for record in head for key in record))
    known = set(names)

    def rows() -> Iterator[Row]:
        for number, record in enumerate(itertools.chain(head, (record for record, _ in records)), 1):
            if not record.keys() <= known:
                new = next(key for key in record if key not in known)
                raise UserError(
                    f"{path}, row {number}: key {new!r} is in none of the first {len(head)} rows, whose keys are the "
                    "columns; put it into the first row (null where there is no value), or leave it out"
                )
            for name in text_columns:
                if isinstance(record.get(name), list | dict):
                    kind = "a list" if isinstance(record[name], list) else "an object"
                    raise UserError(f"{path}, row {number}: column {name!r} holds {kind}; it must hold plain text")
            yield [_json_text(record.get(name)) for name in names]

    return names, rows()


def _json_records(lines: Iterator[str], path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Objects, and the characters that they took, about."""
    first = next((line for line in lines if line.strip()), "")
    records: Iterator[tuple[Any, int]]
    if first.lstrip().startswith("["):
        records = ((record, 0) for record in _loads(_whole(first, lines, path), path, ""))
    else:
        filled = (line for line in itertools.chain([first], lines) if line.strip())
        records = ((_loads(line, path, f", row {number}"), len(line)) for number, line in enumerate(filled, 1))
    for number, (record, length) in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f"{path}, row {number}: {shown(record)} is not an object of column names and values")
        yield record, length


def _whole(first: str, lines: Iterator[str], path: Path) -> str:
    """The text of an array that is written over many lines."""
    text = [first]
    characters = len(first)
    for line in lines:
        text.append(line)
        characters += len(line)
        if characters > MOST_IN_JSON:
            raise UserError(f"{path}: an array longer than {MOST_IN_JSON >> 20} MiB; write one object a line")
    return "".join(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} twice in one object")
    return found


def _constant(name: str) -> float | None:
    """JSON has no such numbers, and Python's writers spell a missing value NaN."""
    return None if name == "NaN" else float(name)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)


def _loads(text: str, path: Path, where: str) -> Any:
    try:
        return _DECODER.decode(text.strip())
    except RecursionError:
        raise UserError(f"{path}{where}: not valid JSON (nested too deep); write one object a line") from None
    except ValueError as error:  # also numbers of thousands of digits
        raise UserError(f"{path}{where}: not valid JSON ({error}); write one object a line, or one array") from None


def _json_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _parquet(path: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        _check_names(file.schema_arrow.names, path)
        if not file.metadata.num_rows:
            raise UserError(f"{path}: the file holds no rows; it needs at least one")
        schema = pa.schema([(field.name, _plain_type(field.type)) for field in file.schema_arrow])
        for batch in file.iter_batches(batch_size=CHUNK_ROWS):
            table = pa.Table.from_batches([batch]).cast(schema)
            table.validate(full=True)  # reading does not: bytes that are no text would be found steps later
            yield table


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """Texts by number (pandas' categories), as texts."""
    return _plain_type(kind.value_type) if pa.types.is_dictionary(kind) else kind


def _tables(names: list[str], rows: Iterator[Row], path: Path) -> Iterator[pa.Table]:
    schema = pa.schema([(name, pa.string()) for name in names])
    done = 0
    for chunk in _chunks(rows):
        try:
            yield pa.table([pa.array(c, pa.string()) for c in zip(*chunk, strict=True)], schema=schema)
        except UnicodeEncodeError:  # json can spell half a surrogate pair
            number = next(number for number, row in enumerate(chunk, done + 1) if _not_text(row) is not None)
            raise UserError(f"{path}, row {number}: not valid text (half a surrogate pair); mend the row") from None
        done += len(chunk)
    if not done:
        raise UserError(f"{path}: the file holds no rows; it needs at least one")


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += sum(len(cell) for cell in row if cell is not None)
        if len(chunk) >= CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _not_text(cells: Sequence[str | None]) -> str | None:
    """The first cell that cannot be written as UTF-8."""
    for cell in cells:
        try:
            (cell or "").encode()
        except UnicodeEncodeError:
            return cell
    return None
