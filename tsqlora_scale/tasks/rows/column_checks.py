"""Checks of whole columns before anything is loaded: present, text, filled, unique."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsqlora_scale.common.disk_arrays import new_array
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.tasks.rows.row_ids import row_numbers

#: The column that every split has, whatever its file calls its ids.
SAMPLE_ID = "sample_id"


def require_columns(dataset: datasets.Dataset, required: Mapping[str, str], *, where: str) -> None:
    """Check that the columns exist.

    Args:
        dataset: a split.
        required: config key -> column name.
        where: the file or dataset, for messages.

    Raises:
        UserError: naming the key, the missing column and the nearest one that exists.
    """
    for key, name in required.items():
        if name in dataset.column_names:
            continue
        near = difflib.get_close_matches(name, dataset.column_names, 1, 0.6)
        hint = f"did you mean {near[0]!r}? It" if near else "It"
        raise UserError(f"{key}={name!r}: no such column in {where}; {hint} has: {', '.join(dataset.column_names)}")


def check_text(dataset: datasets.Dataset, name: str, *, where: str, may_be_empty: bool = False) -> np.ndarray:
    """Check that a column holds text, and something other than blanks in every row.

    Args:
        may_be_empty: accept blanks.

    Returns:
        Which rows hold more than blanks, (N,) bool.

    Raises:
        UserError: naming file, row and column.
    """
    column = dataset.data.column(name)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise UserError(f"{where}: column {name!r} holds {column.type} values; it must hold text")
    found = new_array(len(column), bool)
    row = 0
    for chunk in column.chunks:  # chunk by chunk: the column may be larger than memory
        try:
            filled = pc.fill_null(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(chunk)), 0), False)
        except pa.ArrowInvalid:
            raise UserError(f"{where}: column {name!r} holds bytes that are no UTF-8; write the data anew") from None
        first = pc.index(filled, False).as_py()
        if first >= 0 and not may_be_empty:
            raise UserError(
                f"{where}, row {row + first + 1}: column {name!r} is empty; "
                "fill it in, or set task.dataset.drop_empty=true to leave such rows out"
            )
        found[row : row + len(chunk)] = filled.to_numpy(zero_copy_only=False)
        row += len(chunk)
    return found


def sample_ids(dataset: datasets.Dataset, id_column: str | None, *, where: str) -> pa.Array | pa.ChunkedArray:
    """The sample ids (N,) as strings: the id column's values, else the rows' positions ``"0"``, ``"1"``, ...

    Those of a column are held in memory, and while they are compared in a table of all of them.

    Raises:
        UserError: an id is empty or occurs twice, or a column of this name exists that is not the id column.
    """
    if id_column is None:
        if SAMPLE_ID in dataset.column_names:
            raise UserError(
                f"{where}: has a column {SAMPLE_ID!r}, the name of our own; "
                f"set task.dataset.id_column={SAMPLE_ID} to use it, or rename it"
            )
        return row_numbers(len(dataset))
    column = dataset.data.column(id_column)
    if pa.types.is_nested(column.type):
        raise UserError(f"task.dataset.id_column={id_column!r}: {where} holds {column.type} values; ids must be plain")
    try:
        ids = pc.cast(column, pa.string()).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(
            f"task.dataset.id_column={id_column!r}: {where} holds {column.type} values that cannot be written as text; "
            "choose another column, or leave it unset to use row numbers"
        ) from None
    empty = pc.index(pc.fill_null(pc.equal(ids, ""), True), True).as_py()
    if empty >= 0:
        raise UserError(f"{where}, row {empty + 1}: id column {id_column!r} is empty; give every row an id")
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = pc.value_counts(ids)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        first, second = np.flatnonzero(pc.equal(ids, twice).to_numpy(zero_copy_only=False))[:2]
        raise UserError(
            f"{where}, rows {first + 1} and {second + 1}: the same id {shown(twice)} in id column {id_column!r}; "
            "make ids unique, or leave task.dataset.id_column unset to use row numbers"
        )
    return ids
