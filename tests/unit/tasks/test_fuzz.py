"""Whatever is in a data file: rows of checked text and labels, or one line that says what is wrong."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.unit.tasks.cases import CLASSES, NUMBERS, SUMMARIES, task_config
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.tasks import load_data
from tsqlora_scale.tasks.rows.readers import read_tables
from tsqlora_scale.tasks.rows.wanted import Wanted

#: Bytes that formats give a meaning to, and some that none expects.
PARTS = ["\t", ",", '"', "\n", "\r\n", "\r", "{", "}", "[", "]", ":", "text", "label", "1", "\\ud800", "\\", "\0", " "]
PARTS += ["NaN", "1e999", "null", "\u2028", "\ufeff"]
MARKS = st.sampled_from([*(part.encode() for part in PARTS), b"\xff"])
CONTENTS = st.binary(max_size=60) | st.lists(MARKS, max_size=25).map(b"".join)
FORMATS = st.sampled_from(["x.tsv", "x.csv", "x.json", "x.jsonl", "x.parquet", "x.tsv.gz"])


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=FORMATS, content=CONTENTS)
@example(name="x.jsonl", content=b'{"text": ' + b"[" * 10**5)
@example(name="x.json", content=b'[{"text": ' + b"9" * 5000 + b"}]")
@example(name="x.csv", content=b'"')
def test_any_bytes_are_tables_or_one_error(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    try:
        tables = list(read_tables(path, Wanted({}, {"task.text[0]": "text"}, others=True)))
    except UserError as error:
        assert str(error).startswith(str(path))  # noqa: PT017
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return
    assert sum(map(len, tables)) > 0
    for table in tables:
        table.validate(full=True)
        assert table.schema == tables[0].schema
        assert len(set(table.column_names)) == len(table.column_names) > 0


plain = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(max_size=4)
plain |= st.sampled_from(["bad", "good"])
cells = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)
NAMES = st.sampled_from(["text", "label", "source", "target", "sample_id", "key"]) | st.text(max_size=3)
records = st.lists(st.dictionaries(NAMES, cells, max_size=4) | cells, max_size=5)
good = st.fixed_dictionaries({"text": st.text(min_size=1), "label": st.sampled_from(["bad", "good"])})


@pytest.mark.parametrize("kind", [CLASSES, NUMBERS, SUMMARIES], ids=["classes", "numbers", "texts"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=records | st.lists(good | st.fixed_dictionaries({"text": plain, "label": plain}), min_size=1, max_size=5))
def test_any_json_is_a_pool_or_one_error(tmp_path: Path, kind: dict[str, Any], rows: list[Any]) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check(tmp_path, kind, "x.jsonl")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.lists(st.text(max_size=5) | st.sampled_from(["good", "bad"]), max_size=3), max_size=5))
def test_any_csv_is_a_pool_or_one_error(tmp_path: Path, rows: list[list[str]]) -> None:
    out = io.StringIO()
    csv.writer(out).writerows([["text", "label"], *rows])
    (tmp_path / "x.csv").write_bytes(out.getvalue().encode("utf-8", "surrogatepass"))
    check(tmp_path, CLASSES, "x.csv")


TEXTS = pa.array(["0", "1"])
DIGITS = pa.array([0, 1], pa.int32())
COLUMNS = [
    *(TEXTS, TEXTS.cast(pa.large_string()), TEXTS.dictionary_encode(), DIGITS, DIGITS.cast(pa.int8())),
    *(DIGITS.cast(pa.float64()), DIGITS.cast(pa.float32()), DIGITS.cast(pa.bool_()), DIGITS.cast(pa.date32())),
    *(DIGITS.cast(pa.decimal128(12, 2)), DIGITS.cast(pa.int64()).cast(pa.timestamp("s")), DIGITS.dictionary_encode()),
    *(pa.nulls(2), pa.array([b"0", b"\xff"]), pa.array([["0"], []]), pa.array([{"a": "0"}, None])),
    *(pa.array(["0", None]), pa.array([0, None]), pa.array([0.0, float("nan")]), pa.array([0.0, float("inf")])),
]


@pytest.mark.parametrize("kind", [CLASSES, NUMBERS, SUMMARIES], ids=["classes", "numbers", "texts"])
def test_any_type_of_parquet_is_a_pool_or_one_error(tmp_path: Path, kind: dict[str, Any]) -> None:
    names = ("source", "target") if kind is SUMMARIES else ("text", "label")
    loaded = 0
    for number, column in enumerate(COLUMNS):
        for other, pair in enumerate(((TEXTS, column), (column, TEXTS))):
            pq.write_table(pa.table(dict(zip(names, pair, strict=True))), tmp_path / f"{number}-{other}.parquet")
            loaded += check(tmp_path, kind, f"{number}-{other}.parquet")
    assert loaded >= 6, "texts of three kinds, at the least"


def check(folder: Path, kind: dict[str, Any], file: str) -> bool:
    """Whether the file is a pool; what a pool promises holds then, and else the error is one line."""
    try:
        data = load_data(task_config(folder, kind, train_file=file), seed=0)
    except UserError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return False
    assert len(data.train) == len(set(data.train["sample_id"])) > 0
    for name in kind.get("text", []) or ("source", "target"):
        assert all(text.strip() for text in data.train[name])
    if kind is CLASSES:
        assert set(data.train["label"]) <= {0, 1}
    return True
