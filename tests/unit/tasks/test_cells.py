"""One grammar of cells: what a file says does not depend on its format, or on the types of its columns."""

from __future__ import annotations

import json
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.tasks.cases import CLASSES, NUMBERS, task_config
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.task_section import TaskConfig
from tsqlora_scale.tasks import load_data
from tsqlora_scale.tasks.rows.cells import texts_of

TEXTS = ["good film", "bad film"]
KEY = uuid.UUID(int=7)


def parquet(folder: Path, metadata: dict[str, Any] | None = None, **columns: Any) -> None:
    table = pa.table({"text": TEXTS, "label": ["good", "bad"]} | columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": metadata}})})
    pq.write_table(table, folder / "train.parquet")


def load(folder: Path, kind: dict[str, Any] = CLASSES, file: str = "train.parquet", **dataset: Any) -> Any:
    return load_data(task_config(folder, kind, train_file=file, **dataset), seed=0).train


@pytest.mark.parametrize(
    ("array", "texts"),
    [
        (pa.array(["a", None]), ["a", None]),
        (pa.array(["a", None], pa.large_string()), ["a", None]),
        (pa.array(["a", None], pa.string_view()), ["a", None]),
        (pa.array(["a", None, "a"]).dictionary_encode(), ["a", None, "a"]),
        (pa.array(["a", "b"], pa.large_string()).dictionary_encode(), ["a", "b"]),
        (pa.array([2, 1]).dictionary_encode(), ["2", "1"]),
        (pa.array([True, None, False]), ["true", None, "false"]),
        (pa.array([1, None, -3], pa.int8()), ["1", None, "-3"]),
        (pa.array([1.0, None, 0.1, float("nan"), 1e16]), ["1.0", None, "0.1", None, "1e+16"]),
        (pa.array([1.0, 0.1], pa.float32()), ["1.0", "0.1"]),
        (pa.array([1.0, 0.5], pa.float16()), ["1.0", "0.5"]),
        (pa.array([Decimal("1.00"), None]), ["1.00", None]),
        (pa.array([0, 1, None], pa.decimal128(38, 9)), ["0.000000000", "1.000000000", None]),
        (pa.nulls(2), [None, None]),
        (pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None, 0], pa.int8())), ["true", None, "false"]),
        (pa.ExtensionArray.from_storage(pa.uuid(), pa.array([KEY.bytes, None], pa.binary(16))), [str(KEY), None]),
        (pa.ExtensionArray.from_storage(pa.json_(), pa.array(["[1]"])), ["[1]"]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_plain_cells_are_texts(array: pa.Array, texts: list[str | None]) -> None:
    assert texts_of(array).to_pylist() == texts


@pytest.mark.parametrize(
    "array", [pa.array([b"a"]), pa.array([["a"]]), pa.array([{"a": 1}]), pa.array([1], pa.date32())], ids=str
)
def test_what_is_no_plain_cell(array: pa.Array) -> None:
    assert texts_of(array) is None


@pytest.mark.parametrize(
    ("label", "labels", "csv", "jsonl"),
    [
        ([True, False], ["no", "yes"], "True,False", "true,false"),
        ([True, False], ["yes", "no"], "True,False", "true,false"),
        ([True, False], ["false", "true"], "True,False", "true,false"),
        ([True, False], 2, "True,False", "true,false"),
        ([1.0, 0.0], 2, "1.0,0.0", "1.0,0.0"),
        ([1.0, 0.0], ["bad", "good"], "1.0,0.0", "1.0,0.0"),
        ([2.0, 1.0], ["1", "2"], "2.0,1.0", "2.0,1.0"),
        ([2, 1], ["1", "2"], "2,1", "2,1"),
        ([Decimal("2.0"), Decimal("1.0")], ["1", "2"], "2.0,1.0", "2.0,1.0"),
        (pa.array(["good", "bad"], pa.string_view()), ["bad", "good"], "good,bad", '"good","bad"'),
        (pa.array(["good", "bad"]).dictionary_encode(), ["bad", "good"], "good,bad", '"good","bad"'),
    ],
)
def test_labels_mean_the_same_in_every_format(tmp_path: Path, label: Any, labels: Any, csv: str, jsonl: str) -> None:
    kind = CLASSES | {"labels": labels}
    parquet(tmp_path, label=label)
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"a,{cell}\n" for cell in csv.split(",")))
    (tmp_path / "t.tsv").write_text("text\tlabel\n" + "".join(f"a\t{cell}\n" for cell in csv.split(",")))
    lines = "".join(f'{{"text": "a", "label": {cell}}}\n' for cell in jsonl.split(","))
    (tmp_path / "t.jsonl").write_text(lines)
    first = labels == ["yes", "no"]
    for file in ("train.parquet", "t.csv", "t.tsv", "t.jsonl"):
        assert load(tmp_path, kind, file)["label"][:] == ([0, 1] if first else [1, 0]), file
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "train.parquet").write_bytes((tmp_path / "train.parquet").read_bytes())
    cfg = task_config(tmp_path, kind, path=None, train_file=None, name=str(hub), dev_split=None)
    assert load_data(cfg, seed=0).train["label"][:] == ([0, 1] if first else [1, 0])


@pytest.mark.parametrize(
    ("text", "found"), [([1, 2], ["1", "2"]), ([1.0, 2.5], ["1.0", "2.5"]), ([True, False], ["true", "false"])]
)
def test_texts_and_ids_that_are_numbers(tmp_path: Path, text: list[Any], found: list[str]) -> None:
    parquet(tmp_path, text=text, key=text)
    train = load(tmp_path, id_column="key")
    assert train["text"][:] == train["sample_id"][:] == found
    lines = [json.dumps({"text": cell, "key": cell, "label": "good"}) for cell in text]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    assert load(tmp_path, file="t.jsonl", id_column="key")["sample_id"][:] == found
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "train.parquet").write_bytes((tmp_path / "train.parquet").read_bytes())
    cfg = task_config(tmp_path, CLASSES, path=None, train_file=None, name=str(hub), dev_split=None, id_column="key")
    assert load_data(cfg, seed=0).train["text"][:] == found


def test_numbers_of_a_regression(tmp_path: Path) -> None:
    for column in ([0.1, 2.0], pa.array([0.1, 2.0], pa.float32()), [Decimal("0.1"), Decimal("2.0")], ["0.1", "2"]):
        parquet(tmp_path, label=column)
        assert load(tmp_path, NUMBERS)["label"][:] == pytest.approx([0.1, 2.0], abs=1e-7)


def test_ids_of_other_types(tmp_path: Path) -> None:
    other = uuid.UUID(int=8)
    parquet(tmp_path, key=pa.ExtensionArray.from_storage(pa.uuid(), pa.array([KEY.bytes, other.bytes], pa.binary(16))))
    assert load(tmp_path, id_column="key")["sample_id"][:] == [str(KEY), str(other)]
    parquet(tmp_path, key=pa.array([0, 1], pa.date32()))
    assert load(tmp_path, id_column="key")["sample_id"][:] == ["1970-01-01", "1970-01-02"]


UNREAD = {
    "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([KEY.bytes] * 2, pa.binary(16))),
    "bool8": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([0, 1], pa.int8())),
    "struct": pa.array([{"a": 1}, {"a": 2}]),
    "empty struct of lists": pa.array([{"a": [{"b": 1}]}, {"a": []}]),
    "list": pa.array([[1], []]),
    "a.b": pa.array([1, 2]),
    "": pa.array([1, 2]),
    "tensor": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int8(), [1]), pa.array([[1], [2]], pa.list_(pa.int8(), 1))
    ),
    "interval": pa.array([1, 2], pa.duration("s")),
    "bytes": pa.array([b"\xff", None]),
}


def test_columns_that_nobody_reads_may_hold_anything(tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS, "label": ["good", "bad"]} | UNREAD)
    pq.write_table(table.append_column("list", pa.array([1, 2])), tmp_path / "train.parquet")  # also one name twice
    assert set(load(tmp_path).column_names) == {"text", "label", "sample_id"}


def test_columns_of_a_hub_dataset_that_nobody_reads(tmp_path: Path) -> None:
    """Types that ``datasets`` has no name for: its parquet files are read as local ones are."""
    for split, rows in (("train", TEXTS), ("validation", TEXTS[::-1])):
        table = pa.table({"text": rows, "label": ["good", "bad"], "map": UNREAD["map"], "uuid": UNREAD["uuid"]})
        pq.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    data = load_data(task_config(tmp_path, CLASSES, path=None, train_file=None, name=str(tmp_path)), seed=0)
    assert data.dev is not None
    assert (data.train["text"][:], data.dev["text"][:]) == (TEXTS, TEXTS[::-1])


def test_an_objective_of_ones_own_finds_every_column_that_can_be_held(tmp_path: Path) -> None:
    parquet(tmp_path, **UNREAD, score=[1.5, 2.0])
    kind = CLASSES | {"objective": "examples/task.py:FocalLoss"}
    train = load(tmp_path, kind)
    assert {"score", "struct", "list", "a.b"} <= set(train.column_names)
    assert train["score"][:] == [1.5, 2.0]
    (tmp_path / "t.csv").write_text(",text,label,note\n0,a,good,x\n")
    assert load(tmp_path, kind, "t.csv")["note"][:] == ["x"]


def test_a_column_whose_name_has_a_dot(tmp_path: Path) -> None:
    parquet(tmp_path, **{"a": [{"b": 1}, {"b": 2}], "a.b": ["x", "y"]})
    assert load(tmp_path, CLASSES | {"text": ["a.b"]})["a.b"][:] == ["x", "y"]


@pytest.mark.parametrize("kind", ["map", "struct", "list", "tensor", "bytes"])
@pytest.mark.parametrize("key", ["text", "label"])
def test_types_that_are_no_cells(tmp_path: Path, kind: str, key: str) -> None:
    parquet(tmp_path, **{key: UNREAD[kind]})
    with pytest.raises(
        UserError, match=rf"train.parquet: column '{key}' holds .* values; it must hold text or a number"
    ):
        load(tmp_path)


class TestOwnClasses:
    """Label numbers whose names the file itself gives, in an order of its own."""

    NAMES = ("good", "bad")

    def write(self, folder: Path, name: str = "train.parquet", names: list[str] | None = None) -> None:
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names or list(self.NAMES))}
        )
        rows = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1]}, features=features)
        rows.to_parquet(str(folder / name))

    @pytest.mark.parametrize("labels", [["bad", "good"], ["good", "bad"], ["bad", "other", "good"]])
    def test_are_matched_by_name(self, tmp_path: Path, labels: list[str]) -> None:
        self.write(tmp_path)
        found = load(tmp_path, CLASSES | {"labels": labels})["label"][:]
        assert [labels[i] for i in found] == ["good", "bad"]

    def test_a_number_of_labels_means_the_numbers(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        assert load(tmp_path, CLASSES | {"labels": 2})["label"][:] == [0, 1]

    def test_other_names_are_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.write(tmp_path)
        assert load(tmp_path, CLASSES | {"labels": ["first", "second"]})["label"][:] == [0, 1]
        assert "task.labels gives them other names" in caplog.text

    def test_a_name_that_is_not_declared(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        with pytest.raises(UserError, match=r"row 1: label '0'.*not among the 2 of task.labels.*'good', 'bad'"):
            load(tmp_path, CLASSES | {"labels": ["bad", "fine"]})

    def test_names_of_another_case_do_not_swap(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        with pytest.raises(UserError, match=r"task.labels \('Bad', 'Good'\) writes differently"):
            load(tmp_path, CLASSES | {"labels": ["Bad", "Good"]})

    def test_written_by_other_versions(self, tmp_path: Path) -> None:
        for names in ({"0": "good", "1": "bad"}, ["good", "bad"]):
            parquet(tmp_path, {"label": {"_type": "ClassLabel", "names": names}}, label=[0, 1])
            assert load(tmp_path)["label"][:] == [1, 0]
        for features in ({}, {"label": {"_type": "Value"}}, {"label": 5}, []):
            parquet(tmp_path, features, label=[0, 1])  # type: ignore[arg-type]
            assert load(tmp_path)["label"][:] == [0, 1]

    def test_a_held_out_set_that_numbers_them_differently(self, tmp_path: Path) -> None:
        """By name both are right; by number one of them would be wrong."""
        self.write(tmp_path)
        self.write(tmp_path, "dev.parquet", ["bad", "good"])
        for labels in (["bad", "good"], None):
            cfg = task_config(
                tmp_path, CLASSES | {"labels": labels}, train_file="train.parquet", dev_file="dev.parquet"
            )
            data = load_data(cfg, seed=0)
            assert data.dev is not None
            assert isinstance(data.labels, list)
            assert [data.labels[i] for i in data.train["label"]] == ["good", "bad"]
            assert [data.labels[i] for i in data.dev["label"]] == ["bad", "good"]
        for other in (2, ["one", "two"]):
            cfg = task_config(tmp_path, CLASSES | {"labels": other}, train_file="train.parquet", dev_file="dev.parquet")
            with pytest.raises(UserError, match=r"dev.parquet: its label numbers stand for .* set task.labels"):
                load_data(cfg, seed=0)

    @pytest.mark.parametrize("named", ["train", "dev"])
    def test_places_beside_names(self, tmp_path: Path, named: str) -> None:
        """The numbers of one are those of its own names, the other one's are places in ``task.labels``."""
        self.write(tmp_path, f"{named}.parquet")
        other = "dev" if named == "train" else "train"
        files = {f"{named}_file": f"{named}.parquet", f"{other}_file": f"{other}.csv"}

        def labels_of(cells: list[str], labels: list[str], **dataset: Any) -> tuple[list[int], list[int]]:
            rows = [f"{text},{cell}" for text, cell in zip([*TEXTS, "a film"], cells, strict=False)]
            (tmp_path / f"{other}.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
            data = load_data(task_config(tmp_path, CLASSES | {"labels": labels}, **files, **dataset), seed=0)
            assert data.dev is not None
            return data.train["label"][:], data.dev["label"][:]

        assert labels_of(["0", "1"], ["good", "bad"]) == ([0, 1], [0, 1])
        assert labels_of(["0", "1"], ["good", "bad", "neither"]) == ([0, 1], [0, 1])
        assert labels_of(["good", "bad"], ["bad", "good"]) == ([1, 0], [1, 0])
        message = r"its label numbers stand for .*are places in task.labels; write these by name, or list task.labels"
        with pytest.raises(UserError, match=message):
            labels_of(["0", "1"], ["bad", "good"])
        assert labels_of(["0", "1"], ["first", "second"]) == ([0, 1], [0, 1])
        if other == "train":  # what is left out may hold anything
            (tmp_path / "wrong.txt").write_text("2\n", encoding="utf-8")
            left_out = {"exclude": str(tmp_path / "wrong.txt")}
            assert labels_of(["good", "bad", "1"], ["bad", "good"], **left_out) == ([1, 0], [1, 0])
            with pytest.raises(UserError, match=message):
                labels_of(["good", "bad", "1"], ["bad", "good"])

    @pytest.mark.parametrize("order", ["abc", "bac", "dbc"])
    def test_sets_of_a_mixture_are_all_remembered(self, order: str, tmp_path: Path) -> None:
        """Places in one, names of ``task.labels`` in another, names in a third, and a fourth that numbers these
        otherwise."""
        (tmp_path / "a.csv").write_text("text,label\na film,0\na plot,1\n", encoding="utf-8")
        self.write(tmp_path, "b.parquet")
        self.write(tmp_path, "c.parquet", ["bad", "good"])
        self.write(tmp_path, "d.parquet", ["first", "second"])
        sets = [
            {"name": name, "dataset": {"train_file": str(tmp_path / ("a.csv" if name == "a" else f"{name}.parquet"))}}
            for name in order
        ]
        tree = {**CLASSES, "labels": ["first", "second"], "metrics": ["accuracy"], "mixture": sets}
        with pytest.raises(UserError, match=r"'c': .*its label numbers stand for \['bad', 'good'\]"):
            load_data(TaskConfig.model_validate(tree), seed=0)

    def test_shards_that_number_them_differently(self, tmp_path: Path) -> None:
        self.write(tmp_path, "a.parquet")
        self.write(tmp_path, "b.parquet", ["bad", "good"])
        with pytest.raises(
            UserError, match=r"b.parquet: its label numbers stand for .*write the files of a split alike"
        ):
            load(tmp_path, file="*.parquet")


def test_long_texts_are_read_in_bounded_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tsqlora_scale.tasks.rows import file_limits
    from tsqlora_scale.tasks.rows.readers import read_tables
    from tsqlora_scale.tasks.rows.wanted import Wanted

    texts = [chr(97 + i % 26) * 1000 + str(i) for i in range(100)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet", compression="none", use_dictionary=False)
    monkeypatch.setattr(file_limits, "CHUNK_CHARACTERS", 20_000)
    tables = list(read_tables(tmp_path / "x.parquet", Wanted({"task.text[0]": "text"})))
    assert max(map(len, tables)) <= 20
    assert [text for table in tables for text in table["text"].to_pylist()] == texts
