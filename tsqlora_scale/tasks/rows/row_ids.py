"""Arrow columns of our own beside a memory-mapped source, mapped too where they are large."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from tsqlora_scale.common import disk_arrays


def row_numbers(size: int) -> pa.ChunkedArray:
    """``"0"``, ``"1"``, ..., (size,) strings."""
    batches = (
        pa.record_batch([pa.array(np.arange(block.start, block.stop)).cast(pa.string())], names=["number"])
        for block in disk_arrays.blocks(size)
    )
    schema = pa.schema([("number", pa.string())])
    if size * (4 + len(str(size))) <= disk_arrays.IN_MEMORY:
        return pa.Table.from_batches(list(batches), schema).column("number")
    return _mapped(batches, schema).column("number")


def _mapped(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """A table in a temporary file, which is gone when the table is, or the process, also a killed one.

    Raises:
        UserError: the disk of TMPDIR has no room, or there is none.
    """
    with disk_arrays.temporary_file("the row numbers") as file:
        with pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return pa.ipc.open_file(pa.py_buffer(mapped)).read_all()
