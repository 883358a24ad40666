"""What a label cell means: class ids and regression targets, with the row of the first bad one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsqlora_scale.common.disk_arrays import blocks, new_array
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown

#: A label cell as files and hub datasets give it.
Cell = str | int | float | bool | None
Labels = Sequence[str] | int
N = TypeVar("N", int, float)

#: What a column of labels or targets may be.
_KINDS = (
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_null, pa.types.is_boolean),
    *(pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal),
)
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}(\.0*)?")


def class_id(cell: Cell, labels: Labels) -> int | None:
    """The class that a cell names, or None where it names none.

    A number ``N`` of labels means the whole numbers 0 to N-1, written as numbers or as text (``1``, ``"1"``,
    ``1.0``). A list of names means these names (blanks around them do not count), and also their positions
    0 to N-1 unless a name is a number itself: with the labels ``["1", "2"]`` the cell ``1`` is the class 0.
    """
    if cell is None:
        return None
    if isinstance(labels, int):
        return _position(cell, labels)
    text = str(cell).lower() if isinstance(cell, bool) else str(cell)
    for name in (text, text.strip()):
        if name in labels:
            return list(labels).index(name)
    if any(_WHOLE.fullmatch(name) for name in labels):
        return None
    return _position(cell, len(labels))


def _position(cell: str | int | float | bool, size: int) -> int | None:
    if isinstance(cell, str):
        cell = cell.strip()
        if not _WHOLE.fullmatch(cell):
            return None
        cell = int(cell.partition(".")[0])
    if cell != cell or cell != cell // 1:  # NaN, infinite or broken
        return None
    return int(cell) if 0 <= cell < size else None


def target_value(cell: Cell) -> float | None:
    """The finite float32 number that a regression cell holds, or None where it holds none."""
    if cell is None or (isinstance(cell, str) and "_" in cell):  # Python reads "1_0" as 10
        return None
    try:
        value = float(cell)
    except (ValueError, OverflowError):
        return None
    return value if abs(value) <= float(np.finfo(np.float32).max) else None  # False for NaN


def class_ids(
    column: pa.ChunkedArray, labels: Labels, *, where: str, name: str, names: Sequence[str] | None = None
) -> np.ndarray:
    """The class ids (N,) int64 of a label column.

    Args:
        column: N label cells.
        labels: ``task.labels``.
        where: the file or dataset, for messages.
        name: the column's name, for messages.
        names: the dataset's own class names, where its labels are ids into a vocabulary of its own. If they
            include the declared ones, classes are matched by name, so that the order of ``labels`` decides.

    Raises:
        UserError: naming file, row and value of the first cell that is empty or no declared label.
    """

    listed = None if isinstance(labels, int) else labels
    vocabulary = names if names is not None and listed is not None and set(listed) <= set(names) else None

    def parse(cell: Cell) -> int | None:
        if vocabulary is not None and isinstance(cell, int) and 0 <= cell < len(vocabulary):
            cell = vocabulary[cell]
        return class_id(cell, labels)

    def problem(cell: Cell, distinct: list[Cell]) -> str:
        found = f"the column holds {len(distinct)} distinct: {_few(distinct)}"
        if isinstance(labels, int):
            rule = f"is not a whole number from 0 to {labels - 1}, as task.labels={labels} means"
            return f"label {shown(cell)} in column {name!r} {rule}; {found}; mend the row, or set or list task.labels"
        rule = f"not among the {len(labels)} of task.labels ({_few(list(labels))})"
        return (
            f"label {shown(cell)} in column {name!r} is {rule}; {found}; mend the row or add the label to task.labels"
        )

    return _parsed(column, parse, problem, np.int64, where=where, name=name)


def regression_targets(column: pa.ChunkedArray, *, where: str, name: str) -> np.ndarray:
    """The targets (N,) float32 of a regression column.

    Raises:
        UserError: naming file, row and value of the first cell that is empty or no finite number.
    """

    def problem(cell: Cell, _: list[Cell]) -> str:
        rule = "is not a finite number, as a regression target must be"
        return f"{shown(cell)} in column {name!r} {rule}; mend or drop the row"

    return _parsed(column, target_value, problem, np.float32, where=where, name=name)


def _parsed(
    column: pa.ChunkedArray,
    parse: Callable[[Cell], N | None],
    problem: Callable[[Cell, list[Cell]], str],
    kind: type[np.number],
    *,
    where: str,
    name: str,
) -> np.ndarray:
    """``parse`` of every cell, (N,) of ``kind``, called once per distinct cell of a block."""
    if not any(is_kind(column.type) for is_kind in _KINDS):
        raise UserError(f"{where}: column {name!r} holds {column.type} values; a label must be text or a number")
    parsed = new_array(len(column), kind)
    for block in blocks(len(column)):
        part = column.slice(block.start, block.stop - block.start)
        distinct = pc.unique(part)
        cells = distinct.to_pylist()
        values = [parse(cell) for cell in cells]
        codes = pc.index_in(part, value_set=distinct).to_numpy()
        bad = [code for code, value in enumerate(values) if value is None]
        if bad:
            row = int(np.flatnonzero(np.isin(codes, bad))[0])
            cell, place = cells[codes[row]], f"{where}, row {block.start + row + 1}"
            if cell is None or (isinstance(cell, str) and not cell.strip()):
                raise UserError(f"{place}: column {name!r} is empty; give every row a label or drop the row")
            raise UserError(f"{place}: {problem(cell, [c for c in pc.unique(column).to_pylist() if c is not None])}")
        parsed[block] = np.array(values)[codes]
    return parsed


def _few(values: Sequence[object]) -> str:
    few = ", ".join(shown(v, 40) for v in values[:6])
    return few + (", ..." if len(values) > 6 else "")
