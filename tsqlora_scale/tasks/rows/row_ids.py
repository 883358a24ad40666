"""Arrow columns of our own beside a memory-mapped source, mapped too where they are large."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from tsqlora_scale.common import disk_arrays
from tsqlora_scale.tasks.rows.cells import is_text, json_of, texts_of

_SCHEMA = pa.schema([("text", pa.string())])


def row_numbers(size: int) -> pa.ChunkedArray:
    """``"0"``, ``"1"``, ..., (size,) strings."""
    batches = (
        pa.record_batch([pa.array(np.arange(block.start, block.stop)).cast(pa.string())], schema=_SCHEMA)
        for block in disk_arrays.blocks(size)
    )
    return _stored(batches, size * (4 + len(str(size))))


def text_column(column: pa.ChunkedArray, *, ids: bool, structured: bool = False) -> pa.ChunkedArray | None:
    """A column (N,) as texts, mapped to disk where it is large; None where its type has no plain cells.

    Args:
        ids: take what :func:`.texts_of` takes of ids.
        structured: take lists of objects, as :func:`.json_of` does, and nothing else.
    """
    if is_text(column.type):
        return column

    def converted(part: pa.Array) -> pa.Array | None:
        return json_of(part) if structured else texts_of(part, ids=ids)

    if converted(pa.nulls(0).cast(column.type) if not column.num_chunks else column.chunk(0)[:0]) is None:
        return None
    batches = (
        pa.record_batch([texts.cast(pa.string())], schema=_SCHEMA)
        for block in disk_arrays.blocks(len(column))
        for part in column.slice(block.start, block.stop - block.start).chunks
        if (texts := converted(part)) is not None
    )
    return _stored(batches, 2 * column.nbytes)


def made_column(parts: Iterable[pa.Array], size_in_bytes: int) -> pa.ChunkedArray:
    """Texts that are made part by part, about so many bytes of them, mapped to disk where they are large."""
    return _stored((pa.record_batch([part], schema=_SCHEMA) for part in parts), size_in_bytes)


def _stored(batches: Iterable[pa.RecordBatch], size_in_bytes: int) -> pa.ChunkedArray:
    if size_in_bytes <= disk_arrays.IN_MEMORY:
        return pa.Table.from_batches(list(batches), _SCHEMA).column(0)
    return _mapped(batches).column(0)


def _mapped(batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """A table in a temporary file, which is gone when the table is, or the process, also a killed one.

    Raises:
        UserError: the disk of TMPDIR has no room, or there is none.
    """
    with disk_arrays.temporary_file("the row numbers") as file:
        with pa.ipc.new_file(file, _SCHEMA) as writer:
            for batch in batches:
                writer.write_batch(batch)
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return pa.ipc.open_file(pa.py_buffer(mapped)).read_all()
