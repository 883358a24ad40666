"""Tables of parquet files: the columns that a task reads as texts, whatever their types are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.tasks.rows import file_limits
from tsqlora_scale.tasks.rows.cells import json_of, texts_of
from tsqlora_scale.tasks.rows.wanted import ID_KEY, STRUCTURED_KEYS, Wanted, check_names, no_plain_cells

#: The key of a schema's metadata under which ``datasets`` describes the columns.
FEATURES = b"huggingface"


def parquet_tables(path: Path, wanted: Wanted) -> Iterator[pa.Table]:
    """The rows of a file, in order.

    Raises:
        UserError: no such column, or one whose cells are no texts, numbers or truth values.
        pyarrow.ArrowException: a damaged file, or bytes that are no text.
    """
    with pq.ParquetFile(path) as file:
        schema: pa.Schema = file.schema_arrow
        check_names(schema.names, where=path)
        names = wanted.among(schema.names, where=path)
        keys = wanted.keys()
        if wanted.others:
            names += [field.name for field in schema if field.name not in keys and _can_stay(field, schema)]
            names.sort(key=schema.names.index)
        if not file.metadata.num_rows:
            raise UserError(f"{path}: the file holds no rows; it needs at least one")
        for batch in file.iter_batches(batch_size=_batch_size(file), columns=names):
            read = pa.Table.from_batches([batch])  # a name with a dot brings more columns than its own
            columns = {name: _column(read.column(name), name, keys.get(name), path) for name in names}
            table = pa.table(columns)
            table.validate(full=True)  # reading does not: bytes that are no text would be found steps later
            yield table


def class_names(path: Path, column: str) -> list[str] | None:
    """The classes that a file's label numbers stand for, as ``datasets`` has written them into it; None without any.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet: {error}; is it damaged, or of another format?") from None
    try:
        feature: Any = json.loads(metadata.get(FEATURES, b"{}"))["info"]["features"][column]
    except (ValueError, KeyError, TypeError):
        return None
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    if isinstance(names, dict):  # number -> name, as some versions write them
        names = [names[number] for number in sorted(names, key=int)]
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) and names else None


def _column(column: pa.ChunkedArray, name: str, key: str | None, path: Path) -> pa.ChunkedArray:
    chunks = [_chunk(chunk, name, key, path) for chunk in column.chunks]
    return pa.chunked_array(chunks)


def _chunk(chunk: pa.Array, name: str, key: str | None, path: Path) -> pa.Array:
    if key is None:
        return _undone(chunk)
    try:
        texts = json_of(chunk) if key in STRUCTURED_KEYS else texts_of(chunk, ids=key == ID_KEY)
    except (pa.ArrowException, ValueError):  # ValueError: a text within a dictionary that is no UTF-8
        texts = None
    if texts is None:
        raise no_plain_cells(key, name, chunk.type, where=path)
    return texts.cast(pa.string())


def _batch_size(file: pq.ParquetFile) -> int:
    """Rows of a table: fewer where they are long."""
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    longest = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    return max(1, min(file_limits.CHUNK_ROWS, file_limits.CHUNK_CHARACTERS // max(longest, 1)))


def _undone(chunk: pa.Array) -> pa.Array:
    """Values by number (pandas' categories), as values."""
    return _undone(chunk.dictionary_decode()) if pa.types.is_dictionary(chunk.type) else chunk


def _can_stay(field: pa.Field, schema: pa.Schema) -> bool:
    """Whether a data set can hold a column that nothing of the config names."""
    kind = field.type
    while pa.types.is_dictionary(kind):
        kind = kind.value_type
    try:
        datasets.Features.from_arrow_schema(pa.schema([pa.field(field.name, kind)]))
    except (ValueError, NotImplementedError, TypeError):
        return False
    return bool(schema.names.count(field.name) == 1)
