"""What a label cell means: class ids, regression targets and weights, with the row of the first bad one."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsqlora_scale.common.disk_arrays import blocks, new_array
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import printable, shown
from tsqlora_scale.tasks.rows.cells import Cell, cell_text, texts_of
from tsqlora_scale.tasks.rows.origin import Origin
from tsqlora_scale.tasks.rows.wanted import LABEL_KEY, no_plain_cells

log = logging.getLogger("tsqlora_scale")

Labels = Sequence[str] | int
N = TypeVar("N", int, float)

#: More classes than any label column has that is one.
MOST_CLASSES = 1000
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}(\.0*)?")
_NUMBER = re.compile(r"[+-]?([0-9]{1,18}(\.[0-9]{0,18})?|\.[0-9]{1,18})([eE][+-]?[0-9]{1,2})?")
_LEADING_ZERO = re.compile(r"[+-]?0[0-9]")
_TRUTH = {"true": True, "false": False}
#: Names of classes that a truth value means.
_NAMED_TRUTH = _TRUTH | {"yes": True, "no": False}


def class_id(cell: Cell, labels: Labels) -> int | None:
    """The class that a cell names, or None where it names none.

    A number ``N`` of labels means the whole numbers 0 to N-1, written as numbers or as text (``1``, ``"1"``,
    ``1.0``). A list of names means these names (blanks around them do not count), and also their positions
    0 to N-1 unless a name is a number itself: with the labels ``["1", "2"]`` the cell ``1`` is the class 0, and so is
    ``1.0``. Truth values (``true``, ``False``) name the class that is called so, or yes and no; else they are the
    positions 1 and 0.
    """
    if cell is None:
        return None
    text = cell_text(cell)
    if isinstance(labels, int):
        return _position(text, labels)
    named = _named(text, labels)
    if named:
        return named[0] if len(named) == 1 else None
    if any(_number(name) is not None for name in labels):
        return None
    return _position(text, len(labels))


def _named(text: str, labels: Sequence[str]) -> list[int]:
    """The classes that a text may name."""
    for name in (text, text.strip()):
        if name in labels:
            return [list(labels).index(name)]
    for meaning, named in ((_number, _number), (_truth, _named_truth)):
        value = meaning(text)
        same = [place for place, name in enumerate(labels) if value is not None and named(name) == value]
        if same:
            return same
    return []


def has_places(column: pa.ChunkedArray, labels: Sequence[str], *, where: Origin, name: str, kept: np.ndarray) -> bool:
    """Whether some cell of a label column is a place in ``labels``, and not a name of them.

    Args:
        kept: the rows that count, (N,) bool; the others may hold anything.

    Raises:
        UserError: the column has no plain cells.
    """
    for block, part in _text_blocks(column, name, where):
        for cell in pc.unique(part.filter(pa.array(kept[block]))).drop_null()[: MOST_CLASSES + 1].to_pylist():
            if not _named(cell, labels) and class_id(cell, labels) is not None:
                return True
    return False


def _number(text: str) -> Decimal | None:
    return Decimal(text.strip()) if _NUMBER.fullmatch(text.strip()) else None


def _truth(text: str) -> bool | None:
    return _TRUTH.get(text.strip().lower())


def _named_truth(name: str) -> bool | None:
    return _NAMED_TRUTH.get(name.strip().lower())


def _position(text: str, size: int) -> int | None:
    truth = _truth(text)
    if truth is None and not _WHOLE.fullmatch(text.strip()):
        return None
    place = int(truth) if truth is not None else int(text.strip().partition(".")[0])
    return place if 0 <= place < size else None


def target_value(cell: Cell) -> float | None:
    """The finite float32 number that a regression cell holds, or None where it holds none; truth values are 1 and 0."""
    value = _float(cell)
    return value if value is not None and abs(value) <= float(np.finfo(np.float32).max) else None  # False for NaN


def weight_value(cell: Cell) -> float | None:
    """The finite number of at least 0 that a cell holds, or None where it holds none."""
    value = _float(cell)
    return value if value is not None and 0 <= value < float("inf") else None


def _float(cell: Cell) -> float | None:
    if cell is None or (isinstance(cell, str) and "_" in cell):  # Python reads "1_0" as 10
        return None
    truth = _truth(cell) if isinstance(cell, str) else None
    try:
        return float(cell if truth is None else truth)
    except (ValueError, OverflowError):
        return None


def class_ids(
    column: pa.ChunkedArray,
    labels: Labels,
    *,
    where: Origin,
    name: str,
    names: Sequence[str] | None = None,
    kept: np.ndarray | None = None,
) -> np.ndarray:
    """The class ids (N,) int64 of a label column.

    Args:
        column: N label cells.
        labels: ``task.labels``.
        where: the file or dataset, for messages.
        name: the column's name, for messages.
        names: the data's own class names, where its labels are numbers of a vocabulary of its own. If one of the
            declared is among them, classes are matched by name, so that the order of ``labels`` decides.
        kept: the rows that count, (N,) bool; None is all. The others may hold anything, and are class 0.

    Raises:
        UserError: naming file, row and value of the first cell that is empty or no declared label.
    """
    vocabulary = _vocabulary(labels, names, where=where, name=name)

    def parse(cell: Cell) -> int | None:
        place = None if vocabulary is None or cell is None else _position(cell_text(cell), len(vocabulary))
        return class_id(cell if vocabulary is None or place is None else vocabulary[place], labels)

    def problem(cell: Cell, distinct: list[Cell]) -> str:
        count = f"more than {MOST_CLASSES}" if len(distinct) > MOST_CLASSES else len(distinct)
        found = f"the column holds {count} distinct: {_few(distinct)}"
        if vocabulary is not None:
            found += f"; numbers are those of the data's own classes ({_few(vocabulary)})"
        if isinstance(labels, int):
            rule = f"is not a whole number from 0 to {labels - 1}, as task.labels={labels} means"
            return f"label {shown(cell)} in column {name!r} {rule}; {found}; mend the row, or set or list task.labels"
        rule = f"not among the {len(labels)} of task.labels ({_few(list(labels))})"
        return (
            f"label {shown(cell)} in column {name!r} is {rule}; {found}; mend the row or add the label to task.labels"
        )

    return _parsed(column, parse, problem, np.int64, where=where, name=name, kept=kept)


def _vocabulary(labels: Labels, names: Sequence[str] | None, *, where: Origin, name: str) -> Sequence[str] | None:
    """The data's own class names, where they decide."""
    if names is None or isinstance(labels, int):
        return None
    if set(labels) & set(names):
        return names
    alike = {text.strip().lower() for text in labels} & {text.strip().lower() for text in names}
    if alike:
        raise UserError(
            f"{where}: column {name!r} has classes of its own ({_few(list(names))}), which task.labels "
            f"({_few(list(labels))}) writes differently; write them as the data does"
        )
    log.warning(
        "%s: the classes of column %r are called %s; task.labels gives them other names, in this order: %s",
        printable(str(where)), name, _few(list(names)), _few(list(labels)),
    )  # fmt: skip
    return None


def regression_targets(
    column: pa.ChunkedArray, *, where: Origin, name: str, kept: np.ndarray | None = None
) -> np.ndarray:
    """The targets (N,) float32 of a regression column.

    Raises:
        UserError: naming file, row and value of the first cell that is empty or no finite number.
    """

    def problem(cell: Cell, _: list[Cell]) -> str:
        rule = "is not a finite number, as a regression target must be"
        return f"{shown(cell)} in column {name!r} {rule}; mend or drop the row"

    return _parsed(column, target_value, problem, np.float32, where=where, name=name, kept=kept)


def draw_weights(column: pa.ChunkedArray, *, where: Origin, name: str, kept: np.ndarray | None = None) -> np.ndarray:
    """The weights (N,) float64 of ``task.dataset.weight``.

    Raises:
        UserError: naming file, row and value of the first cell that is empty, negative or no finite number.
    """

    def problem(cell: Cell, _: list[Cell]) -> str:
        rule = "is not a finite number of at least 0, as task.dataset.weight must be"
        return f"{shown(cell)} in column {name!r} {rule}; mend the row"

    return _parsed(column, weight_value, problem, np.float64, where=where, name=name, kept=kept)


def infer_labels(
    column: pa.ChunkedArray, *, where: Origin, name: str, names: Sequence[str] | None, kept: np.ndarray
) -> list[str]:
    """The classes that a label column holds: the data's own, in their order, else those of its cells.

    Numbers are sorted as numbers, other cells as text; so the order depends on nothing but the classes.

    Raises:
        UserError: one class alone, or more than a label column has.
    """
    if names is not None:
        return list(names)
    found: set[str] = set()
    for block, part in _text_blocks(column, name, where):
        found |= {text.strip() for text in pc.unique(part.filter(pa.array(kept[block]))).to_pylist() if text}
        if len(found) > MOST_CLASSES:
            break
    found.discard("")
    rows = int(np.count_nonzero(kept))
    if len(found) > MOST_CLASSES or (rows > 50 and len(found) > rows / 2):
        more = "more than " if len(found) > MOST_CLASSES else ""
        most = f"{more}{MOST_CLASSES if more else len(found)}"
        raise UserError(
            f"task.label={name!r}: holds {most} different values in the {rows} rows of {where} "
            f"({_few(sorted(found))}); those are no classes: check task.label, set task.type=regression for "
            "numbers, or task.labels to the classes or their number"
        )
    labels = _sorted(found)
    if len(labels) < 2:
        raise UserError(
            f"task.label={name!r}: holds {len(labels)} class{'es' if not labels else ''} in {where} ({_few(labels)}); "
            "a classification task needs at least two: check the column, or set task.labels"
        )
    return labels


def _sorted(found: set[str]) -> list[str]:
    """One name for each meaning: ``1`` and ``1.0`` are one class, as are ``true`` and ``True``.

    Codes are texts: ``0110`` and ``1.10``, where there is ``1.1``, too.
    """
    numbers = {text: number for text in found if (number := _number(text)) is not None}
    if len(numbers) == len(found) and not _are_codes(numbers):
        return [_plain(number) for number in sorted(set(numbers.values()))]
    if all(_truth(text) is not None for text in found):
        return sorted({text.lower() for text in found})
    return sorted(found)


def _are_codes(numbers: Mapping[str, Decimal]) -> bool:
    """Whether texts that read as numbers, none of which is empty, are written as no number is."""
    if any(_LEADING_ZERO.match(text) for text in numbers):
        return True
    parts = [number for number in numbers.values() if number != number.to_integral_value()]
    return len(set(parts)) < len(parts)


def _plain(number: Decimal) -> str:
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text.removeprefix("+")


def _text_blocks(column: pa.ChunkedArray, name: str, where: Origin) -> Iterator[tuple[slice, pa.ChunkedArray]]:
    """A column of labels, block by block, as texts.

    Raises:
        UserError: its type has no plain cells.
    """
    for block in blocks(len(column)):
        part = column.slice(block.start, block.stop - block.start)
        texts = [texts_of(chunk) for chunk in part.chunks]
        if any(text is None for text in texts):
            raise no_plain_cells(LABEL_KEY, name, column.type, where=where)
        yield block, pa.chunked_array(texts)


def _parsed(
    column: pa.ChunkedArray,
    parse: Callable[[Cell], N | None],
    problem: Callable[[Cell, list[Cell]], str],
    kind: type[np.number],
    *,
    where: Origin,
    name: str,
    kept: np.ndarray | None,
) -> np.ndarray:
    """``parse`` of every cell, (N,) of ``kind``, called once per distinct cell of a block; 0 of those not kept."""
    parsed = new_array(len(column), kind)
    for block, part in _text_blocks(column, name, where):
        distinct = pc.unique(part)
        cells = distinct.to_pylist()
        values = [parse(cell) for cell in cells]
        codes = pc.index_in(part, value_set=distinct).to_numpy()
        bad = np.isin(codes, [code for code, value in enumerate(values) if value is None])
        if kept is not None:
            bad &= kept[block]
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            cell, place = cells[codes[row]], where.row(block.start + row)
            if cell is None or not cell.strip():
                raise UserError(f"{place}: column {name!r} is empty or nan; give every row a value or drop the row")
            known: dict[Cell, None] = {}
            for _, texts in _text_blocks(column, name, where):
                known |= dict.fromkeys(pc.unique(texts).drop_null()[: MOST_CLASSES + 1].to_pylist())
                if len(known) > MOST_CLASSES:  # of a column of numbers or texts all may differ
                    break
            raise UserError(f"{place}: {problem(cell, list(known))}")
        parsed[block] = np.array([0 if value is None else value for value in values])[codes]
    return parsed


def _few(values: Sequence[object]) -> str:
    few = ", ".join(shown(v, 40) for v in values[:6])
    return few + (", ..." if len(values) > 6 else "")
