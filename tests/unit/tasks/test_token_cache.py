"""Texts that are tokenized once: the same batches as without, whoever makes them, and never from a damaged folder."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from tests.disks import full
from tests.tiny import WORDS
from tests.unit.tasks.cases import ANSWERS, CLASSES, NUMBERS, SUMMARIES, TEXT
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks import Task
from tsqlora_scale.tasks.tokens import recipe, token_cache, token_store
from tsqlora_scale.tasks.tokens.token_cache import NoPlace, TokenCache
from tsqlora_scale.tasks.tokens.token_store import ABOUT, StoreWriter, TokenStore, packed
from tsqlora_scale.tasks.tokens.tokenizing_processes import Tokenizing, tokenized

MakeTask = Callable[..., Task]
Models = Callable[[str], Path]
CHATS = {"type": "causal", "messages": "source", "max_length": 48, "max_target_length": 16, "metrics": ["loss"]}
TEMPLATE = (
    "{% if messages[0].role == 'tool' %}{{ raise_exception('never') }}{% endif %}"
    "{% for m in messages %}<mask> {{ m.role }} {{ m.content }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<mask> assistant {% endif %}"
)
ROWS = 23


def tsv(kind: dict[str, Any]) -> str:
    """Texts from none of a word to more than are kept, one with a mark in it."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 1 + 5 * i)) for i in range(ROWS - 1)] + ["a </s> film é😀"]
    if "label" in kind:
        answers = [("good", "bad")[i % 2] if kind["type"] == "classification" else f"{i / 7}" for i in range(ROWS)]
        names = [*kind["text"], kind["label"]]
        return "\n".join(
            ["\t".join(names), *("\t".join([*[t] * (len(names) - 1), a]) for t, a in zip(texts, answers, strict=True))]
        )
    if "messages" in kind:
        turns = [[{"role": "user", "content": t}, {"role": "assistant", "content": t[:40]}] for t in texts]
        return "\n".join(["source", *map(json.dumps, turns)])
    return "\n".join(["source\ttarget", *(f"{t}\t{t[::2]}." for t in texts)])


KINDS = {
    "classes": ("bert", CLASSES), "pairs": ("bert", CLASSES | {"text": ["text", "other"]}),
    "numbers": ("mpnet", NUMBERS), "decoder's classes": ("llama", TEXT | CLASSES), "summaries": ("bart", SUMMARIES),
    "answers": ("llama", ANSWERS | {"prefix": "the plot: "}), "chats": ("llama", CHATS),
}  # fmt: skip


def made(kind: str, make_task: MakeTask, **keys: Any) -> Task:
    """A task of a kind on the rows of its kind, whose tokenizer writes conversations."""
    model, task = KINDS[kind]
    return make_task(model, task | keys, tsv(task), template=TEMPLATE if kind == "chats" else None)


def tokenizing(task: Task, kind: str, models: Models, limit: int) -> Tokenizing:
    return Tokenizing(task._cfg, task.tokenizer, AutoConfig.from_pretrained(models(KINDS[kind][0])), limit)


def kept(task: Task, kind: str, models: Models, root: Path, *, workers: int = 1, limit: int = 48) -> TokenStore:
    assert task.kept_tokens.columns is not None
    cache = TokenCache(root, workers, str(root))
    view = task.read_rows("train")
    store = cache.store(view, task.kept_tokens.columns, tokenizing(task, kind, models, limit))
    for split in ("train", "dev"):
        task.kept_tokens.keep(split, task.read_rows(split), limit, store)
    return store


def same(first: Any, second: Any) -> bool:
    """Two batches, to the bit."""
    assert first.inputs.keys() == second.inputs.keys()
    tensors = [(first.targets, second.targets), *((first.inputs[n], second.inputs[n]) for n in first.inputs)]
    if first.prompts is not None:
        tensors += [(first.prompts[n], second.prompts[n]) for n in first.prompts]
    equal = all(torch.equal(a, b) and a.dtype == b.dtype for a, b in tensors)
    return equal and np.array_equal(first.indices, second.indices)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_same(
    kind: str, make_task: MakeTask, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, other = made(kind, make_task), made(kind, make_task)
    kept(task, kind, models, tmp_path / "tokens")
    kept(task, kind, models, tmp_path / "tokens", limit=32)
    batches = [[0], [ROWS - 1, 3, 3, 0], list(range(ROWS))]
    expected = [
        other.batch(rows, split=s, max_length=m) for rows in batches for s in ("train", "dev") for m in (None, 32, 31)
    ]

    def never(self: Any, rows: Any, max_length: int) -> Any:
        assert max_length == 31, "a text is tokenized again"
        return tokens(self, rows, max_length)

    tokens = type(task._objective).tokens
    monkeypatch.setattr(type(task._objective), "tokens", never)
    found = [
        task.batch(rows, split=s, max_length=m) for rows in batches for s in ("train", "dev") for m in (None, 32, 31)
    ]
    assert all(map(same, expected, found))


@pytest.mark.parametrize("kind", ["answers", "chats", "pairs"])
def test_a_row_is_tokenized_alike_alone_and_among_others(kind: str, make_task: MakeTask, models: Models) -> None:
    task = made(kind, make_task)
    cells = task.read_rows("train")[:]
    whole = task._objective.tokens(cells, 48)
    for row in range(ROWS):
        alone = task._objective.tokens({name: values[row : row + 1] for name, values in cells.items()}, 48)
        assert alone == {name: values[row : row + 1] for name, values in whole.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow  # two processes import the libraries
def test_processes_make_the_same_in_the_same_order(make_task: MakeTask, models: Models) -> None:
    task = made("chats", make_task)
    of = tokenizing(task, "chats", models, 48)
    good = [task.read_rows("train").with_format("arrow")[[row, row]] for row in range(ROWS)]
    here = [
        {name: (part.lengths, part.values) for name, part in block.items()} for block in tokenized(iter(good), of, 1)
    ]
    bad = json.dumps([{"role": "tool", "content": "1"}, {"role": "assistant", "content": "the film"}])
    seen = iter([*good, pa.table({"source": [bad]}), *good])
    there = tokenized(seen, of, 2)
    for block in here:
        found = next(there)
        assert found.keys() == block.keys()
        for name, (lengths, values) in block.items():
            assert np.array_equal(found[name].lengths, lengths) and np.array_equal(found[name].values, values)
            assert found[name].values.dtype == values.dtype
    with pytest.raises(UserError, match=r"the conversation that begins '1': .* template fails on it \(never\)"):
        next(there)
    assert len(list(seen)) > ROWS // 2, "no more than some are read ahead"


def test_what_tokens_depend_on(make_task: MakeTask, models: Models, tmp_path: Path) -> None:
    def key(task: Task, limit: int = 48) -> str:
        of = tokenizing(task, "answers", models, limit)
        return recipe.recipe(of.cfg, of.tokenizer, of.model_config, limit)

    task = made("answers", make_task)
    first = key(task)
    task.tokenizer(["the film"], truncation=True, max_length=2, padding=True)
    assert key(task) == first == key(made("answers", make_task)), "a call leaves no trace"
    assert key(made("answers", make_task, num_beams=2)) == first
    others = [key(made("answers", make_task, **keys)) for keys in ({"prefix": ""}, {"max_target_length": 9})]
    others.append(key(task, 40))
    task.tokenizer.chat_template = TEMPLATE
    others.append(key(task))
    task.tokenizer.add_tokens(["film"])
    others.append(key(task))
    assert len({first, *others}) == 6


def test_texts_are_known_by_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {"a": ["x", "yz", None, "", "é"] * 5, "b": ["1"] * 25}
    whole = datasets.Dataset.from_dict(cells)
    digest = recipe.text_digest(whole, ["a", "b"])
    parts = [whole.select(range(7)), whole.select(range(7, 25))]
    assert recipe.text_digest(datasets.concatenate_datasets(parts), ["a", "b"]) == digest
    assert recipe.text_digest(whole.select(list(range(25))), ["a", "b"]) == digest
    wide = whole.cast(datasets.Features({"a": datasets.Value("large_string"), "b": datasets.Value("string")}))
    assert recipe.text_digest(wide, ["a", "b"]) == digest
    monkeypatch.setattr(recipe, "ROWS", 4)
    assert recipe.text_digest(whole, ["a", "b"]) == digest
    moved = datasets.Dataset.from_dict(cells | {"a": ["xy", "z", None, "", "é"] * 5})
    emptied = datasets.Dataset.from_dict(cells | {"a": ["x", "yz", "", "", "é"] * 5})
    digests = {recipe.text_digest(rows, ["a", "b"]) for rows in (moved, emptied, whole.select(range(24)))}
    digests |= {recipe.text_digest(whole, ["b", "a"]), recipe.text_digest(whole, ["a"]), digest}
    assert len(digests) == 6


@settings(max_examples=50)
@given(data=st.data())
def test_rows_come_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("store")
    number = {"input_ids": 70_000, "learned": 1, "prompt": 2**31 - 1}
    blocks = [
        {name: data.draw(st.lists(st.lists(st.integers(0, most), max_size=4), min_size=size, max_size=size))
         for name, most in number.items()}
        for size in data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    ]  # fmt: skip
    writer = StoreWriter(folder)
    for block in blocks:
        writer.write(packed(block, vocabulary=70_001))
    writer.close({})
    rows = {name: [row for block in blocks for row in block[name]] for name in number}
    count = len(rows["learned"])
    store = TokenStore(folder, rows=count)
    asked = data.draw(st.lists(st.integers(0, count - 1)))
    assert store.rows(asked) == {name: [values[i] for i in asked] for name, values in rows.items()}


def cut(folder: Path) -> None:
    path = folder / "input_ids.values"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "prompt.ends"
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [(cut, "input_ids.values has .* bytes"), (flip, "contents of prompt.ends"), (lambda f: (f / ABOUT).unlink(), ABOUT),
     (lambda f: (f / ABOUT).write_text("{"), "Expecting"), (lambda f: (f / "prompt.values").unlink(), "prompt.values")],
)  # fmt: skip
def test_a_damaged_folder_is_made_anew(
    damage: Any, says: str, make_task: MakeTask, models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = made("answers", make_task)
    folder = kept(task, "answers", models, tmp_path / "tokens").folder
    whole = contents(folder)
    damage(folder)
    assert contents(folder) != whole
    assert contents(kept(task, "answers", models, tmp_path / "tokens").folder) == whole
    (record,) = caplog.records
    assert "are damaged" in record.getMessage()
    assert re.search(says, record.getMessage())


def test_a_full_disk(make_task: MakeTask, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = made("answers", make_task)
    monkeypatch.setattr(token_store, "fsync", full)
    with pytest.raises(
        NoPlace, match=rf"the tokens of {ROWS} rows cannot be written .*{os.strerror(errno.ENOSPC)}.*; make"
    ):
        kept(task, "answers", models, tmp_path / "tokens")
    assert not [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]
    (tmp_path / "file").write_text("")
    with pytest.raises(NoPlace, match="file' "):
        kept(task, "answers", models, tmp_path / "file")


def test_several_at_once_make_one(
    make_task: MakeTask, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock of a file is another in every opening of it, as among processes."""
    calls, barrier = [], threading.Barrier(4)
    tokenized = token_cache.tokenized

    def counted(*arguments: Any) -> Any:
        calls.append(threading.get_ident())
        return tokenized(*arguments)

    monkeypatch.setattr(token_cache, "tokenized", counted)
    tasks = [made("answers", make_task) for _ in range(4)]
    found: list[TokenStore] = []

    def work(task: Task) -> None:
        barrier.wait()
        found.append(kept(task, "answers", models, tmp_path / "tokens"))

    threads = [threading.Thread(target=work, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(calls) == 1
    assert len({store.folder for store in found}) == 1


def test_what_a_killed_process_left_goes(make_task: MakeTask, models: Models, tmp_path: Path) -> None:
    task = made("answers", make_task)
    folder = kept(task, "answers", models, tmp_path / "tokens").folder
    left = folder.with_name(f".{folder.name}.{token_cache._here()}.1.partial")
    folder.rename(left)
    (left / ABOUT).unlink()
    assert kept(task, "answers", models, tmp_path / "tokens").folder == folder
    assert not left.exists()


def test_where_there_are_no_locks_the_first_stays(
    make_task: MakeTask, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "none")

    task = made("answers", make_task)
    monkeypatch.setattr(token_cache.fcntl, "flock", missing)
    folder = kept(task, "answers", models, tmp_path / "tokens").folder
    assert kept(task, "answers", models, tmp_path / "tokens").folder == folder


def test_the_key() -> None:
    def value(setting: Any) -> Any:
        return TaskConfig.model_validate(
            {**ANSWERS, "dataset": {"train_file": "a.tsv"}, "token_cache": setting}
        ).token_cache

    assert [value(False), value(True), value("off"), value("x")] == ["off", "auto", "off", "x"]
    with pytest.raises(ValueError, match="'' names no folder"):
        value("")
