"""Checks of whole columns before anything is loaded: text, filled, unique."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsqlora_scale.common.disk_arrays import new_array
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.tasks.rows.origin import Origin
from tsqlora_scale.tasks.rows.row_ids import row_numbers

#: The column that every split has, whatever its file calls its ids.
SAMPLE_ID = "sample_id"


def check_text(
    column: pa.ChunkedArray, name: str, *, where: Origin, kept: np.ndarray, may_be_empty: bool = False
) -> np.ndarray:
    """Check that a column holds text, and something other than blanks in every row.

    Args:
        column: N texts.
        name: the column's name, for messages.
        where: the file or dataset, for messages.
        kept: the rows that count, (N,) bool; the others may be empty.
        may_be_empty: accept blanks.

    Returns:
        Which rows hold more than blanks, (N,) bool.

    Raises:
        UserError: naming file, row and column.
    """
    found = new_array(len(column), bool)
    row = 0
    for chunk in column.chunks:  # chunk by chunk: the column may be larger than memory
        try:
            texts = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(chunk)), 0)
        except pa.ArrowInvalid:
            raise UserError(f"{where}: column {name!r} holds bytes that are no UTF-8; write the data anew") from None
        filled = pc.fill_null(texts, False).to_numpy(zero_copy_only=False)
        block = slice(row, row + len(chunk))
        empty = np.flatnonzero(~filled & kept[block])
        if len(empty) and not may_be_empty:
            raise UserError(
                f"{where.row(row + int(empty[0]))}: column {name!r} is empty; "
                "fill it in, or set task.dataset.drop_empty=true to leave such rows out"
            )
        found[block] = filled
        row += len(chunk)
    return found


def sample_ids(
    column: pa.ChunkedArray | None, id_column: str | None, *, where: Origin, size: int, present: list[str]
) -> pa.ChunkedArray:
    """The sample ids (N,) as strings: the id column's values, else the rows' positions ``"0"``, ``"1"``, ...

    Those of a column are held in memory, and while they are compared in a table of all of them.

    Args:
        column: N ids as texts.
        present: the other columns of the data.

    Raises:
        UserError: an id is empty or occurs twice, or a column of this name exists that is not the id column.
    """
    if column is None:
        if SAMPLE_ID in present:
            raise UserError(
                f"{where}: has a column {SAMPLE_ID!r}, the name of our own; "
                f"set task.dataset.id_column={SAMPLE_ID} to use it, or rename it"
            )
        return row_numbers(size)
    ids = pc.cast(column, pa.string()).combine_chunks()
    empty = pc.index(pc.fill_null(pc.equal(ids, ""), True), True).as_py()
    if empty >= 0:
        raise UserError(f"{where.row(empty)}: id column {id_column!r} is empty; give every row an id")
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = pc.value_counts(ids)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        first, second = np.flatnonzero(pc.equal(ids, twice).to_numpy(zero_copy_only=False))[:2]
        raise UserError(
            f"{where.rows(int(first), int(second))}: the same id {shown(twice)} in id column {id_column!r}; "
            "make ids unique, or leave task.dataset.id_column unset to use row numbers"
        )
    return ids
