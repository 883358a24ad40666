"""Several data sets as one pool: their columns, ids and held-out sets, and what share of the draws each has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoConfig, AutoTokenizer

from tests.reference import mixtures as slow
from tests.unit.tasks.vocabularies import dropping
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks import Data, Task, build_task, load_data, load_dev, with_tokens
from tsqlora_scale.tasks.rows.mixed_sets import MixedSets, asked_shares
from tsqlora_scale.tasks.rows.set_columns import DATA_SET, ROW_WEIGHT

Write = Callable[[str, "str | bytes"], Path]
FILMS = "text\tlabel\na film\tgood\nb film\tbad\nc film\tgood\n"
BOOKS = "id,review,stars\nx,a book,1\ny,,0\nz,c book,0\nw,d book,1\n"


def mixture(folder: Path, *sets: dict[str, Any], **task: Any) -> TaskConfig:
    """A task on sets whose files lie in the folder."""
    placed = [each | {"dataset": {"path": str(folder)} | each["dataset"]} for each in sets]
    return TaskConfig.model_validate({"type": "classification", "max_length": 48} | task | {"mixture": placed})


def films(**more: Any) -> dict[str, Any]:
    return {"name": "films", "text": "text", "label": "label", **more, "dataset": {"train_file": "films.tsv"}}


def books(*, dataset: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    own = {"train_file": "books.csv", "id_column": "id", "drop_empty": True}
    return {"name": "books", "text": ["review"], "label": "stars", **more, "dataset": own | (dataset or {})}


@pytest.fixture
def place(write: Write, tmp_path: Path) -> Path:
    write("films.tsv", FILMS)
    write("books.csv", BOOKS)
    return tmp_path


LABELS = {"labels": ["bad", "good"]}


def test_one_pool_of_two_files(place: Path, write: Write) -> None:
    write("more.tsv", FILMS)
    cfg = mixture(place, films(), books(dataset={"dev_file": {"old": "more.csv", "new": "books.csv"}}), **LABELS)
    write("more.csv", "review,stars\nold book,1\n")
    data = load_data(cfg, seed=0)
    assert data.train["text"][:] == ["a film", "b film", "c film", "a book", "c book", "d book"]
    assert data.train["label"][:] == [1, 0, 1, 1, 0, 1]
    assert data.train["sample_id"][:] == ["films/0", "films/1", "films/2", "books/x", "books/z", "books/w"]
    assert data.train[DATA_SET][:] == [0, 0, 0, 1, 1, 1]
    assert set(data.train.column_names) == {"sample_id", "text", "label", DATA_SET}
    assert list(cfg.dev_sets) == ["books.old", "books.new"]
    assert data.dev is not None and data.dev["text"][:] == ["old book"]
    assert data.more_dev["books.new"]["sample_id"][:] == ["x", "z", "w"]
    alone = load_dev(cfg, seed=0)
    assert alone.more_dev["books.new"]["label"][:] == [1, 0, 1] and len(alone.train) == 0


def test_the_task_names_the_columns(place: Path, write: Write) -> None:
    write("query.jsonl", "".join(json.dumps({"review": f"query {i}", "label": "good"}) + "\n" for i in range(10)))
    cfg = mixture(place, films(), books(), text="review", query=str(place / "query.jsonl"), **LABELS)
    data = load_data(cfg, seed=0)
    pool = data.pool(with_query=True)
    assert pool["review"][:3] == ["a film", "b film", "c film"] and pool["review"][6] == "query 0"
    assert pool[DATA_SET][:] == [0] * 3 + [1] * 3 + [2] * 10
    sets = MixedSets.in_pool(cfg, pool)
    assert sets is not None and sets.names == ("films", "books", "query") and sets.sizes().tolist() == [3, 3, 10]


def test_parts_of_sets(place: Path) -> None:
    films_part = films() | {"dataset": {"train_file": "films.tsv", "max_train_samples": 2}}
    data = load_data(mixture(place, films_part, books(), **LABELS), seed=0)
    assert data.train[DATA_SET][:] == [0, 0, 1, 1, 1]
    (place / "out.txt").write_text(" books/z\nfilms/1 \n")
    out = str(place / "out.txt")
    parts = [films() | {"dataset": {"train_file": "films.tsv", "exclude": out}}, books(dataset={"exclude": out})]
    data = load_data(mixture(place, *parts, **LABELS), seed=0)
    assert data.train["sample_id"][:] == ["films/0", "films/2", "books/x", "books/w"]


def test_the_classes_of_all(place: Path, write: Write) -> None:
    with pytest.raises(UserError, match=r"task.mixture, 'books': its classes are \['0', '1'\], those of 'films'"):
        load_data(mixture(place, films(), books()), seed=0)
    write("books.csv", "review,stars\na,good\nb,bad\n")
    other = {"name": "books", "text": "review", "label": "stars", "dataset": {"train_file": "books.csv"}}
    assert load_data(mixture(place, films(), other), seed=0).labels == ["bad", "good"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset": {"train_file": "none.csv"}}, "task.mixture, 'books': task.dataset.train_file='none.csv': no such"),
        ({"text": "txt"}, "task.mixture, 'books': task.text[0]='txt': no such column"),
        ({"dataset": {"drop_empty": False}}, "row 2: column 'review' is empty"),
        ({"label": "review"}, "task.mixture, 'books': "),
    ],
)
def test_mistakes_name_the_set(place: Path, change: dict[str, Any], words: str) -> None:
    changed = books(**change) if change.get("label") != "review" else books(text="stars", label="review")
    with pytest.raises(UserError) as caught:
        load_data(mixture(place, films(), changed, **LABELS), seed=0)
    assert words in str(caught.value) and "\n" not in str(caught.value)


TEXTS = {"type": "causal", "max_target_length": 8}


def chats(write: Write) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": "a film"}, {"role": "assistant", "content": "good"}]
    write("chats.jsonl", json.dumps({"messages": turns, "tools": [{"name": "look"}]}) + "\n")
    write("alpaca.jsonl", "".join(json.dumps({"q": q, "i": i, "a": "yes"}) + "\n" for q, i in [("s", "t"), ("u", "")]))
    return [
        {"name": "alpaca", "source": "q", "input": "i", "target": "a", "dataset": {"train_file": "alpaca.jsonl"}},
        {"name": "chats", "messages": "messages", "tools": "tools", "dataset": {"train_file": "chats.jsonl"}},
    ]


def test_texts_beside_conversations(write: Write, tmp_path: Path) -> None:
    alpaca, chat = chats(write)
    for sets in ([alpaca | {"prefix": "Do: "}, chat], [chat, alpaca | {"prefix": "Do: "}]):
        cfg = mixture(tmp_path, *sets, **TEXTS)
        assert (cfg.messages, cfg.tools, cfg.source) == ("messages", "tools", None)
        train = load_data(cfg, seed=0).train.sort("sample_id")
        asked = [json.loads(cell)[0]["content"] for cell in train["messages"]]
        assert asked == ["Do: s\n\nt", "Do: u", "a film"]
        assert json.loads(train["messages"][0])[1] == {"role": "assistant", "content": "yes"}
        assert train["tools"][:2] == [None, None] and json.loads(train["tools"][2]) == [{"name": "look"}]


def test_sets_of_texts(write: Write, tmp_path: Path) -> None:
    alpaca, _ = chats(write)
    write("plain.csv", "target,source\nyes,what\n")
    plain = {"name": "plain", "source": "source", "target": "target", "dataset": {"train_file": "plain.csv"}}
    train = load_data(mixture(tmp_path, alpaca | {"prefix": "> "}, plain, **TEXTS), seed=0).train
    assert train["q"][:] == ["> s", "> u", "what"] and train["i"][:] == ["t", "", None]
    swapped = plain | {"source": "target", "target": "source"}
    train = load_data(mixture(tmp_path, plain, swapped | {"name": "swapped"}, **TEXTS), seed=0).train
    assert train["source"][:] == ["what", "yes"] and train["target"][:] == ["yes", "what"]


def task_of(cfg: TaskConfig, data: Data, folder: Path) -> Task:
    return build_task(cfg, data, AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder))


def test_rows_without_tokens(place: Path, write: Write, models: Callable[[str], Path]) -> None:
    """Shares are of the rows that are left; only sets that say so lose some."""
    write("books.csv", "id,review,stars\nx,a book,1\ny,\u200b,0\nz,c book,0\n")
    tokenizer = dropping()
    cfg = mixture(place, films(weight=1), books(weight=3), **LABELS)
    data = with_tokens(cfg, load_data(cfg, seed=0), tokenizer)
    assert data.train["sample_id"][:] == ["films/0", "films/1", "films/2", "books/x", "books/z"]
    weights = task_of(cfg, data, models("bert")).draw_weights()
    np.testing.assert_allclose(weights, [5 / 12] * 3 + [15 / 8] * 2)
    cfg = mixture(place, films(), books(dataset={"drop_empty": False, "id_column": None}), **LABELS)
    with pytest.raises(UserError, match=r"^task.mixture, 'books': books.csv, row 2: the column read as 'text' is"):
        with_tokens(cfg, load_data(cfg, seed=0), tokenizer)


def test_a_task_knows_its_sets(place: Path, models: Callable[[str], Path]) -> None:
    found = {}
    for name, more in {"even": {}, "hot": {"temperature": 1e9}, "same": {}}.items():
        cfg = mixture(place, films(), books(dataset={"dev_file": "books.csv"}), **LABELS, **more)
        found[name] = task_of(cfg, load_data(cfg, seed=0), models("bert"))
    assert found["even"].draw_weights() is None
    np.testing.assert_allclose(found["hot"].draw_weights(), 1.0)
    assert found["even"].digest() == found["same"].digest() != found["hot"].digest()
    assert found["even"].held_out == {"dev": "books/"}
    assert found["even"].best_metric == "books/accuracy"
    assert found["even"].given(slice(2, 4)).to_pydict() == {
        DATA_SET: ["films", "books"], "text": ["c film", "a book"], "label": ["good", "good"]
    }  # fmt: skip
    assert found["even"].strata().tolist() == [1, 0, 1, 1, 0, 1]
    assert found["hot"].strata().tolist() == [1, 0, 1, 3, 2, 3]


def mixed(numbers: list[int], own: list[float] | None, names: int, **more: Any) -> tuple[MixedSets, datasets.Dataset]:
    sets = [{"name": f"s{i}", "text": "t", "label": "l", "dataset": {"train_file": "x"}} for i in range(names)]
    for each, weight in zip(sets, more.pop("weights", None) or [], strict=False):
        each["weight"] = weight
    cfg = TaskConfig.model_validate({"type": "regression", "mixture": sets, **more})
    columns: dict[str, Any] = {DATA_SET: np.array(numbers, np.int16)}
    if own is not None:
        columns[ROW_WEIGHT] = np.array(own, np.float64)
    pool = datasets.Dataset.from_dict(columns)
    found = MixedSets.in_pool(cfg, pool)
    assert found is not None
    return found, pool


POSITIVE = st.floats(1e-3, 1e3)


@given(st.data())
def test_shares_are_those_of_the_reference(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    numbers = [*range(count), *data.draw(st.lists(st.integers(0, count), max_size=12))]
    numbers = sorted(numbers)
    sizes = [numbers.count(i) for i in range(count)]
    weights = data.draw(st.none() | st.lists(POSITIVE, min_size=count, max_size=count))
    temperature = None if weights else data.draw(st.none() | st.floats(0.1, 100))
    wanted = slow.shares(sizes, weights, temperature)
    np.testing.assert_allclose(asked_shares(np.array(sizes), weights, temperature), wanted)

    own = data.draw(st.none() | st.lists(POSITIVE, min_size=len(numbers), max_size=len(numbers)))
    if own is not None:
        own = [1.0 if number == count else weight for number, weight in zip(numbers, own, strict=True)]
    more = {"weights": weights} if weights else {"temperature": temperature}
    sets, pool = mixed(numbers, own, count, **more)
    found = sets.draw_weights(pool)
    assert (found is None) == (own is None and weights is None and temperature is None)
    if found is not None:
        in_pool = np.array(numbers) < count
        expected = slow.probabilities([n for n in numbers if n < count], [
            w for w, n in zip(own or [1.0] * len(numbers), numbers, strict=True) if n < count
        ], wanted)  # fmt: skip
        np.testing.assert_allclose(found[in_pool] / found[in_pool].sum(), expected)
        np.testing.assert_allclose(found[in_pool].mean(), 1.0)
        assert (found[~in_pool] == 1.0).all()

    some = np.array(data.draw(st.lists(st.sampled_from(range(len(numbers))), unique=True, min_size=1)))
    drawn = np.array(data.draw(st.lists(POSITIVE, min_size=len(some), max_size=len(some))))
    expected = drawn / drawn.sum()
    if sets.shares is not None and (np.array(numbers)[some] < count).any():
        expected = slow.probabilities([numbers[i] for i in some], drawn.tolist(), wanted, query=count)
    sets.balance(some, drawn)
    np.testing.assert_allclose(drawn / drawn.sum(), expected)


def test_a_low_temperature_is_no_overflow() -> None:
    np.testing.assert_allclose(asked_shares(np.array([10**6, 10, 1]), temperature=0.001), [1, 0, 0], atol=1e-12)


MISTAKES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"dataset": {"train_file": "x"}}, {}, "'dataset' and 'mixture' both name data"),
    ({"mixture": [], "text": "a", "label": "b"}, {}, "'dataset' names no data"),
    ({"temperature": 2.0, "dataset": {"train_file": "x"}, "mixture": [], "text": "a", "label": "b"}, {}, "is not set"),
    ({"temperature": 2.0}, {}, "'temperature' and the 'weight' of sets both say"),
    ({"temperature": 0.0}, {}, "greater than 0"),
    ({}, {"weight": None}, "'weight' is given for 'films' and not for 'books'"),
    ({}, {"weight": -1.0}, "greater than 0"),
    ({}, {"name": "films"}, "two sets called 'films'"),
    ({}, {"name": "query"}, "'query' is no name of a data set"),
    ({}, {"name": "a/b"}, "'a/b' is no name of a data set"),
    ({}, {"source": "text"}, "'source' of 'books' is of another kind of task than 'classification'"),
    ({}, {"text": ["a", "b"]}, "'books' has 2 columns of text, and the task 1"),
    ({}, {"text": ["stars"]}, "'books' names the column 'stars' twice"),
    ({}, {"dataset": {}}, "'dataset' of 'books' names no data"),
    ({}, {"text": ["review"], "messages": "m", "source": "s"}, "'books' names whole conversations"),
    ({}, {"tools": "tools"}, "'tools' of 'books' goes with 'messages'"),
    ({"text": "data_set"}, {}, "'data_set' is a column of ours"),
]


@pytest.mark.parametrize(("task", "change", "words"), MISTAKES, ids=[words for _, _, words in MISTAKES])
def test_contradictions(task: dict[str, Any], change: dict[str, Any], words: str) -> None:
    second = books(weight=1.0) | change
    tree = {"type": "classification", "mixture": [films(weight=2.0), second]} | task
    with pytest.raises(ValidationError) as caught:
        TaskConfig.model_validate(tree)
    assert words in str(caught.value)


def test_one_line_names_the_key() -> None:
    task = {"type": "classification", "mixture": [films(weight=2.0), books(weight="much")]}
    tree = {"model": {"name_or_path": "x"}, "train": {"max_steps": 1, "batch_size": 1, "lr": 1e-3}, "task": task}
    with pytest.raises(UserError, match=r"^config: task.mixture.1.weight='much': input should be"):
        parse_config(tree)
    task["mixture"][1] = books(weight=1.0) | {"wieght": 2}
    with pytest.raises(UserError, match=r"unknown key 'task.mixture.1.wieght'; did you mean 'task.mixture.weight'"):
        parse_config(tree)
    task["mixture"][1] = books(weight=1.0)
    with pytest.raises(UserError, match=r"'sampling.replacement: false' takes every sample once an epoch"):
        parse_config(tree | {"sampling": {"replacement": False}})


def test_optional_columns_are_those_of_their_sets() -> None:
    tree = {"type": "causal", "source": "s", "target": "t", "input": "i"}
    sets = [{"name": name, "dataset": {"train_file": "x"}} for name in "ab"]
    with pytest.raises(ValidationError, match="'input' is named by no set of 'mixture'"):
        TaskConfig.model_validate(tree | {"mixture": sets})
    cfg = TaskConfig.model_validate(tree | {"mixture": [sets[0] | {"input": "more"}, sets[1]]})
    assert [cfg.of_set(each).input for each in cfg.mixture] == ["more", None]
    assert TaskConfig.model_validate(cfg.model_dump()) == cfg


def test_two_held_out_sets_of_one_name_are_refused() -> None:
    from tests.unit.config_trees import message

    files = {"train_file": "a.csv", "dev_file": {"mnli": "b.csv"}}
    sets = [
        {"name": "glue", "dataset": files},
        {"name": "glue.mnli", "dataset": {"train_file": "c.csv", "dev_file": "d.csv"}},
    ]
    task = {"type": "classification", "text": ["text"], "label": "label", "labels": 2, "mixture": sets}
    found = message({"model": {"name_or_path": "x"}, "task": task, "train": {"max_steps": 1}})
    assert "two held-out sets that would be called 'glue.mnli'" in found


def test_one_half_of_the_held_out_rows_of_every_set() -> None:
    """As a comparison that tunes asks for it."""
    sets = [{"name": name, "dataset": {"train_file": f"{name}.csv", "dev_file": "dev.csv"}} for name in ("a", "b")]
    task = {"type": "classification", "text": ["text"], "label": "label", "labels": 2, "mixture": sets}
    tree = {
        "model": {"name_or_path": "x"},
        "task": task | {"dataset": {"dev_half": "report"}},
        "train": {"max_steps": 1},
    }
    task_config = parse_config(tree).task
    assert [task_config.of_set(each).dataset.dev_half for each in task_config.mixture] == ["report"] * 2
