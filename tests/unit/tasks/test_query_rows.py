"""The rows of ``task.query``: read, checked against pool and held-out sets, and joined to the pool."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.unit.tasks.cases import ANSWERS, CLASSES, NUMBERS, SUMMARIES, task_config
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks import Data, Task, build_task, load_data, load_dev

Write = Callable[[str, "str | bytes"], Path]
TRAIN = "text\tlabel\n" + "".join(f"a film {i}\t{'good' if i % 2 else 'bad'}\n" for i in range(8))
DEV = "text\tlabel\nthe  plot\tgood\nan ending\tbad\n"


def lines(count: int = 10, **cells: Any) -> list[dict[str, Any]]:
    return [{"text": f"a scene {i}", "label": "good" if i % 3 else "bad"} | cells for i in range(count)]


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def load(folder: Path, kind: dict[str, Any] = CLASSES, /, query: Any = "query.jsonl", **dataset: Any) -> Data:
    return load_data(task_config(folder, kind | {"query": query}, **dataset), seed=0)


@pytest.fixture
def place(write: Write, tmp_path: Path) -> Path:
    """A pool of 8, a held-out set of 2 and a query of 10."""
    write("train.tsv", TRAIN)
    write("dev.tsv", DEV)
    write("query.jsonl", jsonl(lines()))
    return tmp_path


def refused(folder: Path, *words: str, **given: Any) -> None:
    with pytest.raises(UserError) as raised:
        load(folder, **given)
    message = str(raised.value)
    assert message.startswith("task.query") or "query.jsonl" in message
    assert not [word for word in words if word not in message], message


def test_the_rows_are_at_the_pools_end(place: Path) -> None:
    data = load(place, dev_file="dev.tsv")
    assert data.query is not None
    assert data.query["sample_id"][:] == [f"query-{i}" for i in range(10)]
    assert data.query["label"][:] == [0, 1, 1, 0, 1, 1, 0, 1, 1, 0]
    assert len(data.train) == 8
    pool = data.pool(with_query=True)
    assert pool["sample_id"][:] == [*map(str, range(8)), *(f"query-{i}" for i in range(10))]
    assert pool["text"][8:] == data.query["text"][:]
    assert len(data.pool(with_query=False)) == 8
    assert load(place, query=None).query is None


def test_several_files(place: Path, write: Write) -> None:
    write("more.tsv", "text\tlabel\nanother scene\tgood\n")
    data = load(place, query=["query.jsonl", "more.tsv"])
    assert data.query is not None
    assert len(data.query) == 11


@pytest.mark.parametrize("count", [9, 501])
def test_too_few_and_too_many(count: int, place: Path, write: Write) -> None:
    write("query.jsonl", jsonl(lines(count)))
    refused(place, f"{count} rows", "10 to 500", *(["train on the others"] if count > 500 else []))


@pytest.mark.parametrize("count", [10, 500])
def test_as_few_and_as_many_as_may_be(count: int, place: Path, write: Write) -> None:
    write("query.jsonl", jsonl(lines(count)))
    data = load(place)
    assert data.query is not None
    assert len(data.query) == count


@pytest.mark.parametrize("text", ["the  plot", "THE PLOT", " the\tplot ", "The plot\n"])
def test_a_row_of_a_held_out_set(text: str, place: Path, write: Write) -> None:
    write("query.jsonl", jsonl([*lines(9), {"text": text, "label": "bad"}]))
    refused(place, "sample 9", "the held-out set", "sample 0", dev_file="dev.tsv")
    refused(place, "'other'", dev_file={"first": "train.tsv", "other": "dev.tsv"})
    load(place)


def test_a_row_of_the_pool_may_be_in_the_query(place: Path, write: Write) -> None:
    write("query.jsonl", jsonl([*lines(9), {"text": "a film 3", "label": "good"}]))
    assert load(place).query is not None


def test_all_columns_of_text_make_a_row(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A question with another answer is another row, and said."""
    write("train.tsv", "source\ttarget\na film\tfine\n")
    write("dev.tsv", "source\ttarget\nthe plot\tdull\n")
    rows = [{"source": f"a scene {i}", "target": "weak"} for i in range(9)]
    for kind in (SUMMARIES, ANSWERS):
        write("query.jsonl", jsonl([*rows, {"source": "the plot", "target": "strong"}]))
        caplog.clear()
        assert load(tmp_path, kind, dev_file="dev.tsv").query is not None
        assert "asks what 1 of the 1 held-out rows ask, too, with another answer" in caplog.text
        write("query.jsonl", jsonl([*rows, {"source": "The plot", "target": "Dull"}]))
        with pytest.raises(UserError, match="held-out set"):
            load(tmp_path, kind, dev_file="dev.tsv")
        write("query.jsonl", jsonl([*rows, {"source": "a scene 3", "target": "strong"}]))
        caplog.clear()
        load(tmp_path, kind, dev_file="dev.tsv")
        assert not caplog.text


def test_an_unknown_label_and_a_missing_column(place: Path, write: Write) -> None:
    write("query.jsonl", jsonl([*lines(9), {"text": "a scene", "label": "perhaps"}]))
    refused(place, "query.jsonl, row 10", "'perhaps'")
    write("query.jsonl", jsonl([{"text": "a scene"}] * 10))
    refused(place, "query.jsonl", "task.label='label'", "no such column")
    write("query.jsonl", jsonl([{"text": "", "label": "good"}, *lines(10)]))
    refused(place, "query.jsonl, row 1", "empty")
    refused(place, "task.query", "nothing.tsv", query="nothing.tsv")


def test_classes_are_those_of_the_pool(place: Path, write: Write) -> None:
    """Where the config names none, also of a query that has only some of them, or others."""
    kind = {key: value for key, value in CLASSES.items() if key != "labels"}
    write("query.jsonl", jsonl(lines(10, label="good")))
    data = load(place, kind)
    assert data.labels == ["bad", "good"]
    assert data.query is not None
    assert set(data.query["label"][:]) == {1}
    write("query.jsonl", jsonl([*lines(9), {"text": "a scene", "label": "fair"}]))
    refused(place, "'fair'")


def test_ids(place: Path, write: Write) -> None:
    write("train.tsv", "key\ttext\tlabel\nquery-b\ta film\tgood\nc\ta plot\tbad\n")
    write("query.jsonl", jsonl([row | {"key": key} for row, key in zip(lines(), "abcdefghij", strict=True)]))
    refused(place, "'query-b'", "rename", id_column="key")
    write("train.tsv", "key\ttext\tlabel\nb\ta film\tgood\nc\ta plot\tbad\n")
    data = load(place, id_column="key")
    assert data.pool(with_query=True)["sample_id"][:4] == ["b", "c", "query-a", "query-b"]
    assert data.pool(with_query=True)["key"][:4] == ["b", "c", "a", "b"]
    write("query.jsonl", jsonl([row | {"key": "a"} for row in lines()]))
    refused(place, "query.jsonl", "'a'", id_column="key")


def test_a_query_needs_no_ids_of_its_own(place: Path, write: Write) -> None:
    write("train.tsv", "key\ttext\tlabel\nb\ta film\tgood\nc\ta plot\tbad\n")
    pool = load(place, id_column="key").pool(with_query=True)
    assert pool["sample_id"][:4] == ["b", "c", "query-0", "query-1"]
    assert pool["key"][:4] == ["b", "c", None, None]


def test_what_is_left_out_of_the_pool_is_not_left_out_of_the_query(place: Path, write: Write) -> None:
    out = write("out.txt", "1\n2\n")
    data = load(place, exclude=str(out))
    assert data.query is not None
    assert len(data.query) == 10
    assert len(data.pool(with_query=True)) == len(load(place).pool(with_query=True)) - 2
    write("out.txt", "1\nquery-2\n")
    with pytest.raises(UserError, match="'query-2'"):
        load(place, exclude=str(out))


def test_weights_are_the_pools(write: Write, place: Path) -> None:
    write("train.tsv", "text\tlabel\tw\na film\tgood\t3\nb film\tbad\t0\nc film\tbad\t0.5\n")
    data = load(place, weight="w")
    assert data.pool(with_query=True)["w"][:] == [3.0, 0.5, *[1.0] * 10]


def test_a_query_that_has_a_column_of_weights(write: Write, place: Path) -> None:
    write("train.tsv", "text\tlabel\tw\na film\tgood\t3\nb film\tbad\t2\n")
    write("query.jsonl", jsonl(lines(10, w=9)))
    assert load(place, weight="w").pool(with_query=True)["w"][:] == [3.0, 2.0, *[1.0] * 10]


def test_numbers(write: Write, place: Path) -> None:
    write("train.tsv", "text\tlabel\na film\t0.5\n")
    write("query.jsonl", jsonl([{"text": f"a scene {i}", "label": i / 4} for i in range(10)]))
    pool = load(place, NUMBERS).pool(with_query=True)
    assert pool["label"][:3] == [0.5, 0.0, 0.25]
    write("query.jsonl", jsonl([{"text": f"a scene {i}", "label": "much"} for i in range(10)]))
    with pytest.raises(UserError, match="much"):
        load(place, NUMBERS)


def test_a_hub_dataset_and_a_file(write: Write, tmp_path: Path) -> None:
    """Classes by their names, ids that are numbers there and texts here."""
    kinds = {"text": datasets.Value("large_string"), "label": datasets.ClassLabel(names=["good", "bad"])}
    features = datasets.Features(kinds | {"key": datasets.Value("int32")})
    rows = {"text": [f"a film {i}" for i in range(6)], "label": [0, 1] * 3, "key": list(range(6))}
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "hub" / "train-00000.parquet"))
    for given in ({}, {"key": 7}, {"key": "x"}):
        told = [row | {key: f"{value}{i}" for key, value in given.items()} for i, row in enumerate(lines())]
        path = write("query.jsonl", jsonl(told))
        tree = CLASSES | {
            "query": str(path),
            "dataset": {"name": str(tmp_path / "hub"), "id_column": "key", "dev_split": None},
        }
        pool = load_data(TaskConfig.model_validate(tree), seed=0).pool(with_query=True)
        assert len(pool) == 16
        assert pool["text"][5:7] == ["a film 5", "a scene 0"]
        assert pool["label"][4:9] == [1, 0, 0, 1, 1]
        assert pool["key"][5:7] == [5, 70 if given.get("key") == 7 else None]
        assert pool["sample_id"][6] == ("query-0" if not given else f"query-{given['key']}0")


def test_held_out_sets_alone_need_no_query(place: Path) -> None:
    (place / "query.jsonl").unlink()
    (place / "train.tsv").unlink()
    data = load_dev(task_config(place, CLASSES | {"query": "query.jsonl"}, dev_file="dev.tsv"), seed=0)
    assert data.dev is not None
    assert data.query is None


@pytest.fixture
def make(place: Path, models: Callable[[str], Path]) -> Callable[..., Task]:
    def make(kind: dict[str, Any] = CLASSES, **keys: Any) -> Task:
        cfg = task_config(place, kind | {"query": "query.jsonl"} | keys, dev_file="dev.tsv")
        folder = models("bert")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return build_task(cfg, load_data(cfg, seed=0), tokenizer, AutoConfig.from_pretrained(folder))

    return make


def test_a_task_has_a_query(make: Callable[..., Task]) -> None:
    task = make()
    assert (len(task), task.query_rows) == (18, 10)
    query = task.query
    assert query is not None
    assert len(query) == 10
    assert list(query.sample_ids)[:2] == ["query-0", "query-1"]
    np.testing.assert_array_equal(task.class_ids()[8:], query.class_ids())
    np.testing.assert_array_equal(task.lengths()[8:], query.lengths())
    np.testing.assert_array_equal(query.strata(), query.class_ids())
    assert query.digest() != task.digest()
    assert (query.query, query.query_rows, query.draw_weights()) == (None, 0, None)
    one, other = query.batch(np.array([3, 0])), task.batch(np.array([11, 8]))
    assert one.inputs["input_ids"].tolist() == other.inputs["input_ids"].tolist()
    assert one.targets.tolist() == other.targets.tolist()


def test_a_query_that_is_not_trained_on(make: Callable[..., Task]) -> None:
    task = make(train_on_query=False)
    assert (len(task), task.query_rows) == (8, 0)
    assert task.query is not None
    assert len(task.query) == 10


def test_strata_of_a_query_have_no_gaps(make: Callable[..., Task], write: Write) -> None:
    write("query.jsonl", jsonl(lines(10, label="good")))
    task = make()
    assert task.query is not None
    assert set(task.query.class_ids().tolist()) == {1}
    assert set(task.query.strata().tolist()) == {0}


def test_the_digest_is_the_content(make: Callable[..., Task], write: Write) -> None:
    first = make()
    assert first.query is not None
    again = make()
    assert again.query is not None
    assert (again.digest(), again.query.digest()) == (first.digest(), first.query.digest())
    write("query.jsonl", jsonl([{"text": "another scene", "label": "bad"}, *lines()[1:]]))
    other = make()
    assert other.query is not None
    assert other.query.digest() != first.query.digest()
    assert other.digest() != first.digest()


def test_the_same_conversation_otherwise_written_is_found(tmp_path: Path) -> None:
    def turns(number: int, **more: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": f"ask {number}", **more}, {"role": "assistant", "content": f"say {number}"}]

    for name, numbers in (("train", range(40, 50)), ("query", range(10)), ("dev", range(20, 24))):
        (tmp_path / f"{name}.jsonl").write_text(jsonl([{"messages": turns(i)} for i in numbers]))
    chats = {"type": "causal", "messages": "messages", "query": "query.jsonl"}
    files = {"train_file": "train.jsonl", "dev_file": "dev.jsonl"}

    def loaded() -> Data:
        return load_data(task_config(tmp_path, ANSWERS | {"source": None, "target": None} | chats, **files), seed=0)

    assert loaded().query is not None
    called = [turns(3)[0], {"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]}]
    (tmp_path / "dev.jsonl").write_text(jsonl([{"messages": called}]))
    assert loaded().query is not None, "another answer"
    other = [
        {"value": "ask  3", "from": "human", "weight": None},
        {"value": "Say\n3 \n", "from": "gpt", "id": 7, "tool_calls": []},
    ]
    (tmp_path / "dev.jsonl").write_text(jsonl([{"messages": turns(20)}, {"messages": json.dumps(other, indent=1)}]))
    with pytest.raises(UserError, match=r"sample 3, is in the held-out set, too \(sample 1\)"):
        loaded()
