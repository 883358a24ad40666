"""Both splits, checked: sources, columns, ids, subsets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from tests.unit.tasks.cases import CLASSES, NUMBERS, SUMMARIES, task_config
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks import load_data

Write = Callable[[str, "str | bytes"], Path]
GOOD = "key\ttext\tlabel\na\tgood film\tgood\nb\tbad film\tbad\nc\ta film\tgood\n"


def load(folder: Path, kind: dict[str, Any] = CLASSES, /, *, seed: int = 0, **dataset: Any) -> Any:
    return load_data(task_config(folder, kind, **dataset), seed=seed)


def test_both_splits(write: Write, tmp_path: Path) -> None:
    write("train.tsv", GOOD)
    write("dev.jsonl", json.dumps({"text": "film", "label": 0}))
    data = load(tmp_path, dev_file="dev.jsonl")
    assert data.train["text"][:] == ["good film", "bad film", "a film"]
    assert data.train["label"][:] == [1, 0, 1]
    assert data.train["sample_id"][:] == ["0", "1", "2"]
    assert set(data.train.column_names) == {"text", "label", "sample_id"}  # no other column is read
    assert data.train.features["label"].dtype == "int64"
    assert data.dev["label"][:] == [0]
    assert load(tmp_path).dev is None


def test_the_fingerprint_is_one_of_what_is_read(write: Write, tmp_path: Path) -> None:
    """Ranks that read the same may share what ``datasets`` keeps under it."""
    write("train.tsv", "text\tlabel\tid\na\tbad\tx\nb\tgood\ty\n")
    kinds = (CLASSES, CLASSES, CLASSES | {"labels": ["good", "bad"]})
    found = [load(tmp_path, kind).train._fingerprint for kind in kinds]
    found.append(load(tmp_path, id_column="id").train._fingerprint)
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_text_lies_on_disk(write: Write, tmp_path: Path) -> None:
    write("train.tsv", GOOD)
    (file,) = load(tmp_path).train.cache_files
    assert Path(file["filename"]).is_relative_to(datasets.config.HF_DATASETS_CACHE)


def test_a_changed_file_is_read_anew(write: Write, tmp_path: Path) -> None:
    path = write("train.tsv", GOOD)
    then = path.stat().st_mtime_ns
    assert len(load(tmp_path).train) == 3
    write("train.tsv", GOOD + "d\tnew film\tbad\n")
    os.utime(path, ns=(then, then))  # another size at the same time
    assert len(load(tmp_path).train) == 4
    write("train.tsv", GOOD.replace("bad film", "sad film") + "d\tnew film\tbad\n")
    os.utime(path, ns=(then, then + 1))  # the same size at another time
    assert load(tmp_path).train["text"][1] == "sad film"


def test_loading_prints_nothing(write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write("train.tsv", GOOD)
    shown = datasets.are_progress_bars_disabled()
    load(tmp_path, dev_file="train.tsv")
    assert capfd.readouterr() == ("", "")
    assert datasets.are_progress_bars_disabled() == shown


def test_regression(write: Write, tmp_path: Path) -> None:
    write("train.tsv", "text\tlabel\na\t0.1\nb\t5\n")
    train = load(tmp_path, NUMBERS).train
    assert train.features["label"].dtype == "float32"
    assert train["label"][:] == [np.float32(0.1), 5.0]


def test_ids_of_a_column(write: Write, tmp_path: Path) -> None:
    write("train.tsv", GOOD)
    write("dev.tsv", GOOD.replace("key", "other"))
    data = load(tmp_path, id_column="key", dev_file="dev.tsv")
    assert data.train["sample_id"][:] == ["a", "b", "c"]
    assert data.dev["sample_id"][:] == ["0", "1", "2"]  # a held-out file needs no ids


def test_an_id_column_of_our_name(write: Write, tmp_path: Path) -> None:
    write("train.tsv", GOOD.replace("key", "sample_id"))
    assert load(tmp_path, id_column="sample_id").train["sample_id"][:] == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"set task.dataset.id_column=sample_id to use it"):
        load(tmp_path)


class TestSubset:
    """``max_train_samples``: a fair, fixed, nested subset that remembers whose rows it holds."""

    @pytest.fixture(autouse=True)
    def _sorted_file(self, write: Write) -> None:
        rows = [f"film {i}\t{'good' if i >= 500 else 'bad'}" for i in range(1000)]
        write("train.tsv", "\n".join(["text\tlabel", *rows]))

    def subset(self, path: Path, size: int, seed: int = 0) -> datasets.Dataset:
        return load(path, seed=seed, max_train_samples=size, dev_file="train.tsv", max_dev_samples=size)

    def test_of_a_sorted_file_is_fair(self, tmp_path: Path) -> None:
        labels = self.subset(tmp_path, 200).train["label"][:]
        assert 70 < sum(labels) < 130  # six standard deviations

    def test_keeps_the_rows_ids(self, tmp_path: Path) -> None:
        train = self.subset(tmp_path, 200).train
        assert len(train) == 200
        assert train["text"][:] == [f"film {i}" for i in train["sample_id"]]

    def test_is_fixed_by_the_seed(self, tmp_path: Path) -> None:
        first, again, other = (self.subset(tmp_path, 50, seed).train["sample_id"][:] for seed in (0, 0, 1))
        assert first == again
        assert first != other

    def test_is_part_of_a_larger_one(self, tmp_path: Path) -> None:
        small, large = (set(self.subset(tmp_path, n).train["sample_id"]) for n in (50, 300))
        assert small < large

    def test_halves_are_of_all_held_out_rows_and_the_same_for_every_seed(self, tmp_path: Path) -> None:
        def half(name: str, seed: int, size: int = 1000) -> set[str]:
            data = load(tmp_path, seed=seed, dev_file="train.tsv", dev_half=name, max_dev_samples=size)
            return set(data.dev["sample_id"])

        tuning, report = half("tuning", 0), half("report", 1)
        assert (len(tuning), len(report), len(tuning | report)) == (500, 500, 1000)
        assert half("tuning", 5) == tuning
        assert half("report", 3, 40) < report and half("report", 4, 40) < report
        assert len(load(tmp_path, dev_half="tuning").train) == 1000

    def test_a_row_has_no_halves(self, tmp_path: Path) -> None:
        (tmp_path / "dev.tsv").write_text("text\tlabel\na film\tgood\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"dev.tsv: has too few rows for a half .*tuning.half: false"):
            load(tmp_path, dev_file="dev.tsv", dev_half="tuning")

    def test_differs_between_splits(self, tmp_path: Path) -> None:
        data = self.subset(tmp_path, 50)
        assert data.train["sample_id"][:] != data.dev["sample_id"][:]

    def test_leaves_the_global_generators_alone(self, tmp_path: Path) -> None:
        np.random.seed(3)
        before = np.random.get_state()[1].copy()
        self.subset(tmp_path, 50)
        assert (np.random.get_state()[1] == before).all()

    def test_may_ask_for_more_than_there_is(self, tmp_path: Path) -> None:
        assert len(self.subset(tmp_path, 5000).train) == 1000


@pytest.mark.parametrize(
    ("change", "kind", "dataset", "message"),
    [
        (("", ""), {}, {"train_file": "trian.tsv"}, r"train_file='trian.tsv': no such file.*did you mean 'train.tsv'"),
        (("", ""), {}, {"dev_file": "x.tsv"}, r"task.dataset.dev_file='x.tsv': no such file"),
        (("", ""), {}, {"path": "/no/such"}, r"task.dataset.path='/no/such': no such folder"),
        (("", ""), {"label": "lable"}, {}, r"task.label='lable': no such column in .*train.tsv; did you mean 'label'"),
        (("", ""), {"text": ["key", "words"]}, {}, r"task.text\[1\]='words': no such column.*has: key, text, label"),
        (("", ""), {}, {"id_column": "ky"}, r"task.dataset.id_column='ky': no such column.*did you mean 'key'"),
        (("\tbad\n", "\tmeh\n"), {}, {}, r"train.tsv, row 2: label 'meh' in column 'label' is not among the 2"),
        (("\tbad\n", "\t\n"), {}, {}, r"train.tsv, row 2: column 'label' is empty"),
        (
            ("bad film", "  "),
            {},
            {},
            r"train.tsv, row 2: column 'text' is empty; fill it in, or set task.dataset.drop_empty",
        ),
        (("b\t", "a\t"), {}, {"id_column": "key"}, r"rows 1 and 2: the same id 'a' in id column 'key'"),
        (("b\t", "\t"), {}, {"id_column": "key"}, r"row 2: id column 'key' is empty"),
        (("", ""), {"labels": 2}, {}, r"row 1: label 'good'.*as task.labels=2 means"),
        (("", ""), {"labels": ["good"]}, {}, r"task.labels=\['good'\]: a classification task needs at least two"),
        (("", ""), {"labels": 1}, {}, r"task.labels=1: a classification task needs at least two"),
        (("", ""), {"labels": ["good", "good"]}, {}, r"a class is named twice"),
        (("", ""), {"metrics": ["acuracy"]}, {}, r"unknown metric 'acuracy'; did you mean 'accuracy'\?"),
        (("", ""), {"metrics": ["pearson"]}, {}, r"'pearson' does not fit a classification task; use accuracy"),
    ],
)
def test_mistakes(
    write: Write, tmp_path: Path, change: tuple[str, str], kind: dict[str, Any], dataset: dict[str, Any], message: str
) -> None:
    write("train.tsv", GOOD.replace(*change) if change[0] else GOOD)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, CLASSES | kind, **dataset)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cell", ["nan", "", "n/a", "1e99"])
def test_bad_regression_targets(write: Write, tmp_path: Path, cell: str) -> None:
    write("train.tsv", f"text\tlabel\na\t1\nb\t{cell}\n")
    with pytest.raises(UserError, match=r"train.tsv, row 2: "):
        load(tmp_path, NUMBERS)


@pytest.mark.parametrize("row", ["\ttarget", "source\t", " \ttarget"])
def test_empty_sources_and_targets(write: Write, tmp_path: Path, row: str) -> None:
    write("train.tsv", f"source\ttarget\na\tb\n{row}\n")
    with pytest.raises(UserError, match=r"train.tsv, row 2: column '(source|target)' is empty"):
        load(tmp_path, SUMMARIES)


def test_an_empty_cell_is_found_in_any_chunk(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["x"] * 25_000 + [None, "y"]
    pq.write_table(pa.table({"text": texts, "label": [0] * len(texts)}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"train.parquet, row 25001: column 'text' is empty"):
        load(tmp_path, train_file="train.parquet")
    pq.write_table(pa.table({"text": [b"a", b"b"], "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"column 'text' holds binary values; it must hold text"):
        load(tmp_path, train_file="train.parquet")


def test_errors_of_the_readers_arrive_whole(write: Write, tmp_path: Path) -> None:
    write("train.tsv", b"text\tlabel\ncaf\xe9\tgood\n")
    with pytest.raises(UserError, match=r"train.tsv, line 2: not UTF-8 text"):
        load(tmp_path)


def test_a_cache_that_cannot_be_written(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("train.tsv", GOOD)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(write("file", "") / "cache"))
    with pytest.raises(UserError, match="set HF_DATASETS_CACHE to a writable folder"):
        load(tmp_path)


class TestHub:
    """``datasets.load_dataset`` by name; a folder in the hub's layout stands for the hub."""

    def config(self, name: Path | str, **dataset: Any) -> TaskConfig:
        return TaskConfig.model_validate(CLASSES | {"dataset": {"name": str(name)} | dataset})

    def test_a_dataset_with_classes_of_its_own(self, tmp_path: Path) -> None:
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["good", "bad"])}
        )
        rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
        rows.to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
        rows.to_parquet(str(tmp_path / "validation-00000-of-00001.parquet"))
        data = load_data(self.config(tmp_path), seed=0)
        assert data.train["label"][:] == [1, 0]  # task.labels is [bad, good]
        assert len(data.dev or []) == 2
        other = load_data(self.config(tmp_path, dev_split="train[:1]"), seed=0)
        assert len(other.dev or []) == 1

    def test_several_held_out_sets(self, tmp_path: Path) -> None:
        for name, rows in (("train", "a,good\nb,bad\n"), ("validation", "c,good\n"), ("test", "d,bad\ne,bad\n")):
            (tmp_path / f"{name}.csv").write_text("text,label\n" + rows)
        for splits in (["test", "validation"], {"test": "test", "other": "validation"}):
            data = load_data(self.config(tmp_path, dev_split=splits), seed=0)
            assert data.dev is not None
            assert data.dev["text"][:] == ["d", "e"]  # the first decides
            assert [rows["text"][:] for rows in data.more_dev.values()] == [["c"]]
            assert list(data.more_dev) == ["validation" if isinstance(splits, list) else "other"]

    def test_failures_are_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(
            UserError, match=r"task.dataset.name='no/such': cannot load dataset no/such, split 'train'"
        ) as e:
            load_data(self.config("no/such"), seed=0)
        assert "\n" not in str(e.value)
        assert "task.dataset.path" in str(e.value)
        (tmp_path / "train.csv").write_text("text,label\na,good\nb,bad\n")
        with pytest.raises(UserError, match=r"split 'validation'.*check name, subset, dev_split"):
            load_data(self.config(tmp_path), seed=0)


def test_rows_with_an_empty_text_can_be_left_out(write: Write, tmp_path: Path) -> None:
    write("train.tsv", GOOD.replace("bad film", "  "))
    data = load(tmp_path, drop_empty=True)
    assert data.train["text"][:] == ["good film", "a film"]
    assert data.train["sample_id"][:] == ["0", "2"]  # the ids stay those of the file
    assert data.train["label"][:] == [1, 1]
    write("train.tsv", "key\ttext\tlabel\na\t \tgood\n")
    with pytest.raises(UserError, match="every row has an empty text"):
        load(tmp_path, drop_empty=True)
