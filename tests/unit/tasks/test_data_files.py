"""Which files a config names: alone, below the home, by a pattern, in parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.tasks.cases import CLASSES
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks import Data, load_data

Write = Callable[[str, "str | bytes"], Path]


def load(kind: dict[str, Any] = CLASSES, **dataset: Any) -> Data:
    return load_data(TaskConfig.model_validate(kind | {"dataset": dataset}), seed=0)


@pytest.fixture
def shards(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three parts, of 2, 3 and 1 rows, in the current folder's ``parts``."""
    (tmp_path / "parts").mkdir()
    for number, rows in ((10, 1), (2, 3), (1, 2)):
        lines = "".join(f"part {number} row {row}\tgood\n" for row in range(rows))
        write(f"parts/p-{number:02d}.tsv", "text\tlabel\n" + lines)
    monkeypatch.chdir(tmp_path)
    return tmp_path


IN_ORDER = ["part 1 row 0", "part 1 row 1", "part 2 row 0", "part 2 row 1", "part 2 row 2", "part 10 row 0"]


def test_a_file_alone(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute, relative to the current folder, below the home; the held-out file likewise."""
    monkeypatch.setenv("HOME", str(shards))
    for name in (str(shards / "parts/p-01.tsv"), "parts/p-01.tsv", "./parts/p-01.tsv", "~/parts/p-01.tsv"):
        data = load(train_file=name, dev_file=name)
        assert data.train["text"][:] == IN_ORDER[:2]
        assert data.dev is not None
        assert len(data.dev) == 2
    assert len(load(path="~/parts", train_file="p-01.tsv").train) == 2
    assert len(load(path="parts", train_file=str(shards / "parts/p-01.tsv")).train) == 2


@pytest.mark.parametrize(
    ("files", "rows"),
    [
        ({"train_file": "parts/*.tsv"}, IN_ORDER),
        ({"path": "parts", "train_file": "p-*.tsv"}, IN_ORDER),
        ({"train_file": "**/p-0?.tsv"}, IN_ORDER[:5]),
        ({"train_file": ["parts/p-10.tsv", "parts/p-0*.tsv"]}, IN_ORDER[5:] + IN_ORDER[:5]),
        ({"path": "parts", "train_file": ["p-01.tsv"]}, IN_ORDER[:2]),
    ],
)
def test_several_files(shards: Path, files: dict[str, Any], rows: list[str]) -> None:
    """A pattern in the order of the names, a list as it is written; ids are rows of the whole."""
    train = load(**files).train
    assert train["text"][:] == rows
    assert train["sample_id"][:] == [str(i) for i in range(len(rows))]


def test_errors_name_the_part_and_its_row(shards: Path, write: Write) -> None:
    write("parts/p-02.tsv", "text\tlabel\na\tgood\nb\tperhaps\n")
    with pytest.raises(UserError, match=r"^parts/p-02.tsv, row 2: label 'perhaps'"):
        load(train_file="parts/*.tsv")
    write("parts/p-10.tsv", "text\tlabel\n \tgood\n")
    with pytest.raises(UserError, match=r"^parts/p-10.tsv, row 1: column 'text' is empty"):
        load(train_file="parts/*.tsv")
    for number, ids in (("01", "ab"), ("02", "cd"), ("10", "ea")):
        write(f"parts/p-{number}.tsv", "text\tlabel\tid\n" + "".join(f"x\tgood\t{i}\n" for i in ids))
    with pytest.raises(UserError, match=r"^parts/p-01.tsv, row 1, and parts/p-10.tsv, row 2: the same id 'a'"):
        load(train_file="parts/*.tsv", id_column="id")


def test_each_part_is_converted_once(shards: Path, write: Write) -> None:
    before = {file["filename"] for file in load(train_file="parts/*.tsv").train.cache_files}
    assert len(before) == 3
    write("parts/p-02.tsv", "text\tlabel\nnew\tgood\n")
    after = {file["filename"] for file in load(train_file="parts/*.tsv").train.cache_files}
    assert len(before & after) == 2


def test_parts_of_several_formats_and_types_are_one_pool(shards: Path) -> None:
    """All of them say texts: an integer, a float, a truth value and a word for the same class."""
    kind = CLASSES | {"labels": 2}
    for name, cells in (("a", [1, 0]), ("b", [1.0, 0.0]), ("c", [True, False]), ("d", ["1", "0"])):
        table = pa.table({"label": cells, "text": pa.array(["x", "y"], pa.large_string()), f"only {name}": [1, 2]})
        pq.write_table(table, f"parts/{name}.parquet")
    Path("parts/e.jsonl").write_text('{"text": "x", "label": 1}\n{"text": "y", "label": false}')
    train = load(kind, train_file=["parts/*.parquet", "parts/e.jsonl"]).train
    assert train["label"][:] == [1, 0] * 5
    assert train["text"][:] == ["x", "y"] * 5


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train_file": "no.tsv"}, r"task.dataset.train_file='no.tsv': no such file in /"),
        ({"train_file": "parts/p-1.tsv"}, r"no such file in parts; did you mean 'p-0?1"),
        ({"train_file": "parts/*.csv"}, r"train_file='parts/\*.csv': matches no file in /.*check the pattern"),
        ({"train_file": "parts"}, r"train_file='parts': is a folder"),
        ({"train_file": ["parts/*.tsv", "parts/p-01.tsv"]}, r"names 'parts/p-01.tsv' twice"),
        ({"train_file": "parts/p-01.tsv", "dev_file": ["x.tsv"]}, r"task.dataset.dev_file='x.tsv': no such file"),
        ({"train_file": "~nobody/x.tsv"}, r"train_file='~nobody/x.tsv': no such file"),
        ({"path": "nowhere", "train_file": "*.tsv"}, r"task.dataset.path='nowhere': no such folder"),
    ],
)
def test_files_that_are_not_there(shards: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(**files)


def test_a_part_without_a_column(shards: Path, write: Write) -> None:
    write("parts/p-02.tsv", "text\tlable\na\tgood\n")
    with pytest.raises(UserError, match=r"task.label='label': no such column in parts/p-02.tsv; did you mean 'lable'"):
        load(train_file="parts/*.tsv")


def test_a_folder_whose_name_looks_like_a_pattern(write: Write, tmp_path: Path) -> None:
    (tmp_path / "a[1]*").mkdir()
    (tmp_path / "a[1]*" / "x.tsv").write_text("text\tlabel\na\tgood\n")
    for name in ("x.tsv", "*.tsv"):
        assert len(load(path=str(tmp_path / "a[1]*"), train_file=name).train) == 1
