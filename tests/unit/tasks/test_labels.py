"""What a label cell means."""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.tasks.rows.label_cells import class_id, class_ids, regression_targets, target_value
from tsqlora_scale.tasks.rows.origin import Origin

CELLS = st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none())
NAMES = st.lists(st.text(min_size=1), min_size=2, max_size=6, unique=True)


@pytest.mark.parametrize(
    ("cell", "labels", "expected"),
    [
        ("good", ["bad", "good"], 1),
        (" good ", ["bad", "good"], 1),
        ("Good", ["bad", "good"], None),
        ("1", ["bad", "good"], 1),
        (0, ["bad", "good"], 0),
        (2, ["bad", "good"], None),
        (-1, ["bad", "good"], None),
        ("1", ["1", "2"], 0),  # a name before a position
        ("0", ["1", "2"], None),  # and no position where names are numbers
        (2, ["1", "2"], 1),
        ("2", 3, 2),
        ("+2.0", 3, 2),
        (2.0, 3, 2),
        (1.5, 3, None),
        ("3", 3, None),
        ("-0", 3, 0),
        ("", 3, None),
        ("one", 3, None),
        ("٣", 5, None),  # a digit, not an ASCII one
        ("9" * 5000, 3, None),
        (math.nan, 3, None),
        (math.inf, 3, None),
        (True, 2, 1),
        (True, ["false", "true"], 1),
        ("True", ["false", "true"], 1),  # as pandas writes it to csv
        (False, ["True", "False"], 1),
        (True, ["yes", "no"], 0),  # by what it means, not by place
        ("true", ["bad", "good"], 1),
        ("TRUE", 2, 1),
        (True, ["true", "yes"], 0),
        (True, ["True", "yes"], None),  # which of them?
        (1.0, ["1", "2"], 0),
        ("2.0", ["1", "2"], 1),
        (Decimal("1.00"), ["1", "2"], 0),
        (0.5, ["0.5", "1.5"], 0),
        ("0.50", ["0.5", "1.5"], 0),
        (1, ["01", "1.0"], None),
        (2.0, ["a", "1.0"], None),
        ("1e0", ["1", "2"], 0),
        (None, 2, None),
        (None, ["None", "x"], None),
    ],
)
def test_class_id(cell: object, labels: list[str] | int, expected: int | None) -> None:
    assert class_id(cell, labels) == expected  # type: ignore[arg-type]


@given(CELLS, st.one_of(NAMES, st.integers(2, 9)))
def test_any_cell_is_a_class_or_nothing(cell: object, labels: list[str] | int) -> None:
    found = class_id(cell, labels)  # type: ignore[arg-type]
    size = labels if isinstance(labels, int) else len(labels)
    assert found is None or (type(found) is int and 0 <= found < size)


@given(NAMES, st.data())
def test_every_declared_name_is_its_own_class(names: list[str], data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(names) - 1))
    assert class_id(names[position], names) == position


@given(st.integers(2, 50), st.data())
def test_a_class_may_be_written_in_any_way(size: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, size - 1))
    for cell in (position, float(position), str(position), f" {position} ", f"{position}.0"):
        assert class_id(cell, size) == position


@given(CELLS)
def test_any_target_is_a_finite_float32_or_nothing(cell: object) -> None:
    value = target_value(cell)  # type: ignore[arg-type]
    assert value is None or np.isfinite(np.float32(value))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_numbers_survive_being_written(value: float) -> None:
    assert target_value(repr(value)) == value
    assert target_value(value) == value


@pytest.mark.parametrize("cell", ["nan", "inf", "-Infinity", "", "4,5", "1_0", "five", "1e39", "1e999", 10**400, None])
def test_what_is_no_target(cell: object) -> None:
    assert target_value(cell) is None  # type: ignore[arg-type]


def test_columns_become_arrays_in_row_order() -> None:
    column = pa.chunked_array([["bad", "good"], ["good"]])
    ids = class_ids(column, ["bad", "good"], where=Origin("f"), name="label")
    assert ids.dtype == np.int64
    assert ids.tolist() == [0, 1, 1]
    targets = regression_targets(pa.chunked_array([["0.5", "-2"], ["0.5"]]), where=Origin("f"), name="score")
    assert targets.dtype == np.float32
    assert targets.tolist() == [0.5, -2, 0.5]
    assert regression_targets(pa.chunked_array([[1.5, 0.0, -0.0]]), where=Origin("f"), name="score").tolist() == [
        1.5,
        0,
        0,
    ]


def test_the_first_bad_row_is_named() -> None:
    column = pa.chunked_array([["good", "bad"], ["good", "neutral", "mixed", "neutral"]])
    with pytest.raises(UserError) as error:
        class_ids(column, ["bad", "good"], where=Origin("f.tsv"), name="label")
    message = str(error.value)
    assert message.startswith("f.tsv, row 4: label 'neutral' in column 'label'")
    assert "not among the 2 of task.labels ('bad', 'good')" in message
    assert "the column holds 4 distinct: 'good', 'bad', 'neutral', 'mixed'" in message


def test_names_where_numbers_were_declared() -> None:
    with pytest.raises(UserError, match=r"row 1: label 'yes'.*whole number from 0 to 1, as task.labels=2.*'yes', 'no'"):
        class_ids(pa.chunked_array([["yes", "no"]]), 2, where=Origin("f"), name="label")


def test_a_bad_target_is_named() -> None:
    with pytest.raises(UserError, match=r"f, row 3: 'NaN' in column 'score' is not a finite number"):
        regression_targets(pa.chunked_array([["1", "2", "NaN"]]), where=Origin("f"), name="score")
    with pytest.raises(UserError, match=r"f, row 2: column 'score' is empty or nan"):
        regression_targets(pa.chunked_array([[1.0, math.nan]]), where=Origin("f"), name="score")
    with pytest.raises(UserError, match=r"f, row 2: column 'score' is empty"):
        regression_targets(pa.chunked_array([[1.0, None]]), where=Origin("f"), name="score")
    with pytest.raises(UserError, match=r"list<item: int64> values; it must hold text or a number"):
        regression_targets(pa.chunked_array([[[1], [2]]]), where=Origin("f"), name="score")


def test_a_datasets_own_class_names_decide() -> None:
    """A hub dataset numbers its classes in its own order; the declared order is what counts."""
    column = pa.chunked_array([[0, 1, 0]])
    kwargs = {"where": Origin("f"), "name": "label", "names": ["entailment", "not_entailment"]}
    assert class_ids(column, ["not_entailment", "entailment"], **kwargs).tolist() == [1, 0, 1]
    assert class_ids(column, ["yes", "no"], **kwargs).tolist() == [0, 1, 0]  # other names: by position
    assert class_ids(column, 2, **kwargs).tolist() == [0, 1, 0]
    with pytest.raises(UserError, match="label '-1'"):  # how hubs mark unlabelled test sets
        class_ids(pa.chunked_array([[0, -1]]), ["not_entailment", "entailment"], **kwargs)


def test_a_column_of_texts_is_not_read_whole_for_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """All cells of a text column differ."""
    cells = pa.chunked_array([[f"text {i}" for i in range(5000)]])
    with pytest.raises(UserError, match="the column holds more than 1000 distinct") as caught:
        class_ids(cells, ["a", "b"], where=Origin("train.csv"), name="text")
    assert len(str(caught.value)) < 500
