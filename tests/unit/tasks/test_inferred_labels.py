"""Classes that the config does not name, from the pool's label column."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.unit.tasks.cases import CLASSES, task_config
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.tasks import Data, load_data, load_dev

Write = Callable[[str, "str | bytes"], Path]
KIND = CLASSES | {"labels": None}


def load(folder: Path, cells: list[Any], **dataset: Any) -> Data:
    lines = [json.dumps({"text": "a film", "label": cell}) for cell in cells]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return load_data(task_config(folder, KIND, train_file="train.jsonl", **dataset), seed=0)


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["good", "bad", "good"], ["bad", "good"]),
        ([" good ", "bad", "good"], ["bad", "good"]),
        (["b", "A", "é", "a"], ["A", "a", "b", "é"]),
        ([1, 0, 1], ["0", "1"]),
        (["10", "9", "2"], ["2", "9", "10"]),
        ([2.0, "1", 1, "+2"], ["1", "2"]),
        ([-1, 1], ["-1", "1"]),
        ([0.5, 1.5, 10.25], ["0.5", "1.5", "10.25"]),
        ([True, False], ["false", "true"]),
        (["True", "false", True], ["false", "true"]),
        (["1", "two"], ["1", "two"]),
        (["yes", "no"], ["no", "yes"]),
    ],
)
def test_are_those_of_the_pool_sorted(tmp_path: Path, cells: list[Any], labels: list[str]) -> None:
    data = load(tmp_path, cells)
    assert data.labels == labels
    again = load(tmp_path, list(reversed(cells)))
    assert again.labels == labels  # whatever comes first
    assert again.train["label"][:] == data.train["label"][::-1]
    assert set(data.train["label"]) == set(range(len(labels)))


def test_are_not_those_of_rows_without_a_text(tmp_path: Path) -> None:
    """Which task.dataset.drop_empty leaves out."""
    rows = [{"text": "a film", "label": label} for label in ("neg", "pos")] + [{"text": " ", "label": "unknown"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_data(task_config(tmp_path, KIND, train_file="train.jsonl", drop_empty=True), seed=0)
    assert (data.labels, len(data.train)) == (["neg", "pos"], 2)


def test_do_not_depend_on_the_part_that_is_used(tmp_path: Path) -> None:
    assert load(tmp_path, ["a"] * 40 + ["b"], max_train_samples=2).labels == ["a", "b"]


def test_a_held_out_set_has_no_others(tmp_path: Path, write: Write) -> None:
    write("dev.jsonl", '{"text": "a", "label": "b"}\n{"text": "a", "label": "new"}')
    with pytest.raises(
        UserError, match=r"dev.jsonl, row 2: label 'new' .* not among the 2 of task.labels \('a', 'b'\)"
    ):
        load(tmp_path, ["b", "a"], dev_file="dev.jsonl")
    with pytest.raises(UserError, match=r"task.labels is not set, .*give the config.yaml of the run folder"):
        load_dev(task_config(tmp_path, KIND, dev_file="dev.jsonl"), seed=0)


def test_a_files_own_classes_keep_their_order(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "m", "a"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 2]}, features=features)
    rows.to_parquet(str(tmp_path / "train.parquet"))
    data = load_data(task_config(tmp_path, KIND, train_file="train.parquet"), seed=0)
    assert (data.labels, data.train["label"][:]) == (["z", "m", "a"], [0, 2])
    hub = task_config(tmp_path, KIND, path=None, train_file=None, name=str(tmp_path), dev_split=None)
    assert load_data(hub, seed=0).labels == ["z", "m", "a"]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["a"] * 3, r"task.label='label': holds 1 class in .*at least two"),
        ([f"text {i}" for i in range(60)], r"holds 60 different values in the 60 rows of .*those are no classes"),
        ([i // 10 for i in range(20_000)], r"holds more than 1000 different values in the 20000 rows"),
        ([i / 7 for i in range(80)], r"task.type=regression"),
        (["a", "b", None], r"row 3: column 'label' is empty"),
        (["a", "b", " "], r"row 3: column 'label' is empty"),
    ],
)
def test_what_are_no_classes(tmp_path: Path, cells: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, cells)


def test_declared_labels_are_left_as_they_are(tmp_path: Path, write: Write) -> None:
    write("train.tsv", "text\tlabel\na\tgood\n")
    assert load_data(task_config(tmp_path, CLASSES), seed=0).labels == ["bad", "good"]


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["1.1", "1.10", "1.2"], ["1.1", "1.10", "1.2"]),
        (["0110", "0210", "0110"], ["0110", "0210"]),
        (["1.50", "2.50"], ["1.5", "2.5"]),
        (["0", "0.5"], ["0", "0.5"]),
    ],
)
def test_codes_are_texts(tmp_path: Path, cells: list[str], labels: list[str]) -> None:
    data = load(tmp_path, cells)
    assert data.labels == labels
    assert [labels[i] for i in data.train["label"]] == [cell if cell in labels else cell.rstrip("0") for cell in cells]
