"""Arrow columns of our own beside a memory-mapped source, mapped too where they are large."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from tsqlora_scale import columns
from tsqlora_scale.errors import UserError


def row_numbers(size: int) -> pa.ChunkedArray:
    """``"0"``, ``"1"``, ..., (size,) strings."""
    batches = (
        pa.record_batch([pa.array(np.arange(block.start, block.stop)).cast(pa.string())], names=["number"])
        for block in columns.blocks(size)
    )
    schema = pa.schema([("number", pa.string())])
    if size * (4 + len(str(size))) <= columns.IN_MEMORY:
        return pa.Table.from_batches(list(batches), schema).column("number")
    return _mapped(batches, schema).column("number")


def _mapped(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """A table in a temporary file, which is gone when the table is, or the process.

    Raises:
        UserError: the disk of TMPDIR has no room.
    """
    try:
        with tempfile.NamedTemporaryFile(suffix=".arrow") as file:
            with pa.ipc.new_file(file, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
            return pa.ipc.open_file(pa.memory_map(file.name)).read_all()
    except OSError as error:
        raise UserError(
            f"TMPDIR={tempfile.gettempdir()!r}: no room for the row numbers of a large pool ({error}); "
            "set TMPDIR to a folder on a larger disk"
        ) from None
