"""Data sets that are looked at block by block."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.unit.tasks.cases import CLASSES, NUMBERS, task_config
from tsqlora_scale.common import disk_arrays
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.tasks import Task, load_data, task
from tsqlora_scale.tasks.rows.row_ids import row_numbers

WORDS = ["film", "a very good film", "dull", "", "the plot is weak", "ünder"]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_arrays, "IN_MEMORY", 0)
    monkeypatch.setattr(disk_arrays, "BLOCK", 7)
    monkeypatch.setattr(task, "ROWS", 7)


def rows(labels: list[str]) -> str:
    lines = [f"{WORDS[i % 6]} {i}\tfilm {WORDS[i % 5]}\t{label}" for i, label in enumerate(labels)]
    return "\n".join(["text\tpair\tlabel", *lines, ""])


def test_row_numbers_lie_on_disk(large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = pa.total_allocated_bytes()
    found = row_numbers(3000)
    assert pa.total_allocated_bytes() - before < 2000, "mapped"
    assert found.to_pylist() == [str(i) for i in range(3000)]
    assert list(tmp_path.iterdir()) == [], "the file has no name any more"
    assert row_numbers(0).to_pylist() == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"TMPDIR=.*the row numbers .*\(No such file or directory\)"):
        row_numbers(30)


def test_row_numbers_have_no_name_while_they_are_written(
    large: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed meanwhile leaves nothing."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []
    cut = disk_arrays.blocks
    monkeypatch.setattr(
        disk_arrays, "blocks", lambda size: (seen.append(list(tmp_path.iterdir())) or b for b in cut(size))
    )
    assert len(row_numbers(30)) == 30
    assert seen == [[]] * 5


def test_lengths_labels_and_ids(large: None, make_task: Callable[..., Task]) -> None:
    labels = [["bad", "good"][i % 3 == 0] for i in range(40)]
    made = make_task("bert", CLASSES | {"text": ["text", "pair"], "labels": ["none", "bad", "good"]}, rows(labels))
    texts = zip(made.train["text"][:], made.train["pair"][:], strict=True)
    assert made.lengths("train").tolist() == [len(text) + len(pair) for text, pair in texts]
    assert made.strata().tolist() == [int(label == "good") for label in labels], "without gaps"
    assert made.train["sample_id"][:] == [str(i) for i in range(40)]
    assert made.train["sample_id"][30:33] == ["30", "31", "32"]
    assert made.train["label"][:] == [1 + int(label == "good") for label in labels]
    subset = make_task("bert", CLASSES, rows(labels), max_train_samples=20)
    ids = [int(i) for i in subset.train["sample_id"][:]]
    assert subset.lengths("train").tolist() == [len(f"{WORDS[i % 6]} {i}") for i in ids]
    assert subset.strata().tolist() == [int(i % 3 == 0) for i in ids]


def test_the_row_of_a_bad_label_in_a_later_block(large: None, write: Callable[..., Path], tmp_path: Path) -> None:
    write("train.tsv", rows([*["bad", "good"] * 10, "odd", "good"]))
    with pytest.raises(UserError, match=r"row 21: label 'odd' .*holds 3 distinct: 'bad', 'good', 'odd'"):
        load_data(task_config(tmp_path, CLASSES), seed=0)
    write("train.tsv", rows([*map(str, np.arange(20) / 4), "x"]))
    with pytest.raises(UserError, match=r"row 21: 'x' .*not a finite number"):
        load_data(task_config(tmp_path, NUMBERS), seed=0)
    write("train.tsv", rows([*map(str, np.arange(20) / 4)]))
    found = load_data(task_config(tmp_path, NUMBERS), seed=0).train
    assert found["label"][:] == (np.arange(20) / 4).tolist()
    assert found.features["label"].dtype == "float32"
