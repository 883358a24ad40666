"""What a user takes out of the pool, and how often the rest is drawn: ``exclude`` and ``weight``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.unit.tasks.cases import CLASSES, task_config
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.tasks import Data, Task, build_task, load_data
from tsqlora_scale.tasks.rows.rated_ids import RatedIds

Write = Callable[[str, "str | bytes"], Path]
ROWS = "key\ttext\tlabel\tw\na\tgood film\tgood\t1\nb\tbad film\tbad\t0\nc\ta film\tgood\t2.5\n"


@pytest.fixture(autouse=True)
def _pool(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("train.tsv", ROWS)
    monkeypatch.chdir(tmp_path)


def load(folder: Path, kind: dict[str, Any] = CLASSES, **dataset: Any) -> Data:
    return load_data(task_config(folder, kind, **dataset), seed=0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("out.txt", "a\n\n c \n"),
        ("out.csv", "sample_id,quality\na,0.1\nc,0.2\na,0.3\n"),
        ("out.tsv", "quality\tid\n1\ta\n2\tc\n"),
        ("out.jsonl", '{"sample_id": "a"}\n{"sample_id": "c", "why": ["x"]}'),
    ],
)
def test_rows_are_left_out_by_their_ids(
    write: Write, tmp_path: Path, name: str, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(name, content)
    for value in (name, str(path)):
        train = load(tmp_path, id_column="key", exclude=value).train
        assert train["sample_id"][:] == ["b"]
        assert train["text"][:] == ["bad film"]
    assert "2 rows that task.dataset.exclude lists are left out" in caplog.text


def test_a_list_leaves_the_drawn_rows_as_they_were(write: Write, tmp_path: Path) -> None:
    """It is of a part that somebody has looked at; of another one nobody has."""
    write(
        "train.tsv", "text\tlabel\tw\n" + "".join(f"film {i}\t{('good', 'bad')[i % 2]}\t{i % 5}\n" for i in range(60))
    )
    for dataset in ({}, {"weight": "w"}):
        before = load(tmp_path, max_train_samples=12, **dataset).train["sample_id"][:]
        write("out.txt", "\n".join([*before[:5], next(str(i) for i in range(60) if str(i) not in before)]))
        after = load(tmp_path, max_train_samples=12, exclude="out.txt", **dataset).train["sample_id"][:]
        assert after == before[5:]
        write("out.txt", "\n".join(before))
        with pytest.raises(UserError, match="leaves no row of those that max_train_samples=12 draws"):
            load(tmp_path, max_train_samples=12, exclude="out.txt", **dataset)


def test_a_list_of_nothing_leaves_nothing_out(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As an audit writes it that has found nothing."""
    write("fixes.csv", "sample_id,text\n")
    assert len(load(tmp_path, exclude="fixes.csv").train) == 3
    assert "0 rows that task.dataset.exclude lists are left out" in caplog.text
    write("other.csv", "name,text\n")
    with pytest.raises(UserError, match="has no column 'sample_id' or 'id'"):
        load(tmp_path, exclude="other.csv")


def test_ids_of_several_files(write: Write, tmp_path: Path) -> None:
    write("drop_1.txt", "a\n")
    write("drop_2.csv", "id\nc\n")
    assert load(tmp_path, id_column="key", exclude="drop_*").train["sample_id"][:] == ["b"]


@pytest.mark.parametrize("name", ["out.csv", "out.txt"])
@pytest.mark.parametrize(("listed", "left"), [("a ", ["a", "c"]), ("a", ["a ", "c"]), (" c", ["a ", "a"])])
def test_blanks_of_an_id_count_where_the_pool_has_them(
    write: Write, tmp_path: Path, name: str, listed: str, left: list[str]
) -> None:
    write("train.tsv", ROWS.replace("\na\t", "\na \t").replace("\nb\t", "\na\t"))
    write(name, f"{listed}\n" if name == "out.txt" else f"id\n{listed}\n")
    assert load(tmp_path, id_column="key", exclude=name).train["sample_id"][:] == left


def test_ids_that_are_row_numbers(write: Write, tmp_path: Path) -> None:
    write("out.jsonl", '{"sample_id": 1}')
    data = load(tmp_path, exclude="out.jsonl", dev_file="train.tsv")
    assert data.train["sample_id"][:] == ["0", "2"]
    assert data.dev is not None
    assert len(data.dev) == 3  # the pool alone


def test_what_is_left_out_may_be_wrong(write: Write, tmp_path: Path) -> None:
    """An unknown label or an empty text is often why."""
    write("train.tsv", ROWS.replace("bad film\tbad\t0", "\tperhaps\tmuch"))
    write("out.txt", "b\n")
    kind = CLASSES | {"labels": None}
    write("train.tsv", ROWS.replace("bad film\tbad\t0", "\tperhaps\tmuch") + "d\tx\tbad\t1\n")
    data = load(tmp_path, kind, id_column="key", exclude="out.txt", weight="w")
    assert data.train["sample_id"][:] == ["a", "c", "d"]
    assert data.labels == ["bad", "good"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("out.txt", "a\nx\ny\n", r"task.dataset.exclude='out.txt': 2 of its 3 ids are no sample's .*\('x', 'y'\)"),
        ("out.txt", "a\nb\nc\n", r"leaves no row of .*train.tsv"),
        ("out.txt", "\n", r"task.dataset.exclude='out.txt': holds no ids"),
        ("out.csv", "text,label\na,b\n", r"out.csv: has no column 'sample_id' or 'id'"),
        ("out.txt", b"\xff", r"out.txt: not UTF-8"),
        ("other.txt", "a", r"task.dataset.exclude='out.txt': no such file"),
    ],
)
def test_mistakes_of_exclude(write: Write, tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    write(name, content)
    with pytest.raises(UserError, match=message):
        load(tmp_path, id_column="key", exclude=name if name != "other.txt" else "out.txt")


@pytest.mark.parametrize("cell", ["-1", "nan", "inf", "", "much", "1_0"])
def test_mistakes_of_weight(write: Write, tmp_path: Path, cell: str) -> None:
    write("train.tsv", ROWS.replace("2.5", cell))
    with pytest.raises(UserError, match=r"train.tsv, row 3: .*column 'w'"):
        load(tmp_path, weight="w")


def test_weights_of_zero(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = load(tmp_path, weight="w", dev_file="train.tsv")
    assert data.train["sample_id"][:] == ["0", "2"]
    assert "1 rows whose 'w' is 0 are left out" in caplog.text
    write("train.tsv", ROWS.replace("2.5", "0").replace("\t1\n", "\t0.0\n"))
    with pytest.raises(UserError, match=r"task.dataset.weight='w': every row of .* weighs 0"):
        load(tmp_path, weight="w")
    with pytest.raises(UserError, match=r"task.dataset.weight='v': no such column"):
        load(tmp_path, weight="v")


def test_the_task_knows_the_weights(write: Write, tmp_path: Path, models: Callable[[str], Path]) -> None:
    """They belong to the data that a resumed run must find again."""
    folder = models("bert")

    def task(**dataset: Any) -> Task:
        cfg = task_config(tmp_path, CLASSES, **dataset)
        data = load_data(cfg, seed=0)
        return build_task(cfg, data, AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder))

    plain, first = task(), task(weight="w")
    assert plain.draw_weights() is None
    assert np.array_equal(first.draw_weights(), [1.0, 2.5])
    write("out.txt", "1")
    digests = {plain.digest(), first.digest(), task(exclude="out.txt").digest()}
    write("train.tsv", ROWS.replace("2.5", "3"))
    assert len(digests | {task(weight="w").digest()}) == 4
    assert task(weight="w", max_train_samples=1).draw_weights() in ([1.0], [3.0])


def test_blanks_of_a_rated_id_count_where_the_pool_has_them() -> None:
    listed = RatedIds("list.txt", {"a ": 1.0, " b": 1.0}, is_list=True)
    assert listed.ratings(["a ", "a", "b", "c"]).tolist() == [1, 0, 1, 0]
    with pytest.raises(UserError, match="has no score for 1 of the pool's 2 samples"):
        RatedIds("scores.csv", {"a ": 0.5}, is_list=False).ratings(["a ", "a"])
