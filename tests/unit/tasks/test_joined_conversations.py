"""Conversations of several columns, turns that weigh nothing, and a template that the config names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.unit.tasks.cases import LENGTHS, task_config
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.model.describe import load_descriptions
from tsqlora_scale.tasks import IGNORED, Task, build_task, load_data, with_tokens
from tsqlora_scale.tasks.objectives.chat_template import read_template
from tsqlora_scale.tasks.rows.conversations import WEIGHT, read_conversation
from tsqlora_scale.tasks.rows.unlabelled import load_unlabelled

CHAT = LENGTHS | {"type": "causal", "messages": "prompt", "completion": "completion"}
TEMPLATE = (
    "{% for m in messages %}<mask> {{ {'user': 'actor', 'assistant': 'director'}.get(m.role, 'story') }} "
    "{{ m.content }} {{ 'dull' if 'weight' in m }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<mask> director {% endif %}"
)
FIRST = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "very good"}]
SECOND = [{"role": "user", "content": "the plot"}, {"role": "assistant", "content": "bad and dull"}]
TEXTS = {"messages": None, "completion": None, "source": "a", "target": "b"}
Make = Callable[..., Task]


@pytest.fixture
def chat_task(models: Callable[[str], Path], tmp_path: Path) -> Make:
    """A task on rows in a file of the test's folder."""

    def make(rows: list[dict[str, Any]], name: str = "train.jsonl", *, more: Any = None, **keys: Any) -> Task:
        path = tmp_path / name
        if name.endswith("parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        cfg = task_config(tmp_path, CHAT | keys, train_file=name, dev_file=name, **(more or {}))
        tokenizer = AutoTokenizer.from_pretrained(models("llama"))
        tokenizer.chat_template = TEMPLATE
        data = with_tokens(cfg, load_data(cfg, seed=0), tokenizer)
        return build_task(cfg, data, tokenizer, AutoConfig.from_pretrained(models("llama")))

    return make


def learned(task: Task, row: int = 0) -> str:
    targets = task.batch([row]).targets[0]
    return task.tokenizer.decode(targets[targets != IGNORED])


def shown(task: Task, row: int = 0) -> str:
    return task.tokenizer.decode(task.batch([row]).inputs["input_ids"][0]).replace("<mask> ", "").replace(" </s>", ".")


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet"])
def test_of_prompt_and_completion_the_completion_is_learned(name: str, chat_task: Make) -> None:
    rows = [
        {"prompt": [*FIRST, SECOND[0]], "completion": SECOND[1:]},
        {"prompt": FIRST[:1], "completion": [FIRST[1], *SECOND]},
    ]
    task = chat_task(rows, name)
    assert shown(task) == "actor the film. director very good. actor the plot. director bad and dull."
    assert learned(task) == "bad and dull </s>"
    assert learned(task, 1) == "very good </s> bad and dull </s>"
    assert task.references([0, 1]) == ["bad and dull"] * 2
    assert task.texts([0]) == [("the film\nvery good\nthe plot", "bad and dull")]
    assert sorted(task.train.column_names) == ["prompt", "sample_id"]


def test_turns_that_weigh_nothing_are_not_learned(chat_task: Make) -> None:
    unlearned = [FIRST[0], FIRST[1] | {WEIGHT: 0}, SECOND[0], SECOND[1] | {WEIGHT: 1}]
    task = chat_task([{"prompt": unlearned}, {"prompt": [*SECOND, *unlearned[:2]]}], completion=None)
    assert learned(task) == learned(task, 1) == "bad and dull </s>"
    assert shown(task, 1) == "actor the plot. director bad and dull.", "nothing is learned of what follows"
    whole = chat_task([{"prompt": unlearned}], completion=None, loss_on="all")
    assert learned(whole).startswith("actor the film </s> <mask> director very good")
    with pytest.raises(UserError, match=r"row 1: .* no turn of the assistant that is learned: all of them weigh 0"):
        chat_task([{"prompt": unlearned[:2]}], completion=None)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_column_of_system_prompts(chat_task: Make, tmp_path: Path, role: str) -> None:
    own = {"role": role, "content": "awful"}
    rows = [
        {"prompt": FIRST, "s": "lovely music"}, {"prompt": FIRST, "s": None}, {"prompt": FIRST, "s": " "},
        {"prompt": [own, *FIRST], "s": "lovely music"},
    ]  # fmt: skip
    task = chat_task(rows, completion=None, system="s")
    exchange = "actor the film. director very good."
    assert [shown(task, i) for i in range(4)] == [
        f"story lovely music. {exchange}",
        exchange,
        exchange,
        f"story awful. {exchange}",
    ]
    new = tmp_path / "new.jsonl"
    new.write_text("".join(json.dumps({"prompt": FIRST[:1], "s": s}) + "\n" for s in ("weak", None)))
    found = load_unlabelled(task._cfg, new)
    assert found.filled.all() and found.data.dev is not None
    cells = [read_conversation(cell) for cell in found.data.dev["prompt"]]
    assert [[turn["content"] for turn in cell] for cell in cells] == [["weak", "the film", "."], ["the film", "."]]


def test_rows_are_named_and_left_out(chat_task: Make) -> None:
    good = {"prompt": FIRST[:1], "completion": FIRST[1:]}
    with pytest.raises(
        UserError, match=r"train.jsonl, row 2: column 'completion' holds .*; it must hold a list of messages"
    ):
        chat_task([good, {"prompt": FIRST[:1], "completion": {"role": "user"}}])
    bare = [good, {"prompt": FIRST, "completion": None}, good]
    with pytest.raises(
        UserError, match="row 2: the conversation in column 'prompt' has no turn of the assistant that is"
    ):
        chat_task(bare)
    task = chat_task(bare, more={"drop_empty": True})
    assert len(task) == 2 and learned(task, 1) == "very good </s>"
    with pytest.raises(UserError, match=r"task.completion='completion': no such column in"):
        chat_task([{"prompt": FIRST}])


def test_a_set_of_a_mixture(tmp_path: Path, models: Callable[[str], Path]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": [*FIRST, SECOND[0]], "completion": SECOND[1:], "s": "x"}))
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [*FIRST, *SECOND]}))
    sets = [
        {"name": "a", "messages": "prompt", "completion": "completion", "system": "s",
         "dataset": {"train_file": str(tmp_path / "a.jsonl")}},
        {"name": "b", "messages": "messages", "dataset": {"train_file": str(tmp_path / "b.jsonl")}},
    ]  # fmt: skip
    cfg = TaskConfig.model_validate(LENGTHS | {"type": "causal", "mixture": sets, "metrics": ["loss"]})
    rows = [read_conversation(cell) for cell in load_data(cfg, seed=0).train["prompt"]]
    assert [[turn.get(WEIGHT) for turn in row] for row in rows] == [[None, None, 0, None, None], [None] * 4]
    assert rows[0][0] == {"role": "system", "content": "x"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (TEXTS | {"completion": "c"}, "'completion' is for tasks with 'messages'"),
        (TEXTS | {"system": "c"}, "'system' is for tasks with 'messages'"),
        (TEXTS | {"type": "seq2seq", "chat_template": "x"},
         "'chat_template' is for causal tasks"),
    ],
)  # fmt: skip
def test_keys_that_go_together(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        task_config(tmp_path, CHAT | keys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory); give a file"),
        (b"\xff", "cannot be read (not UTF-8 text); give a file"),
        (b" \n", "holds nothing; write a template into it"),
        (b"a\n{% for m in %}", ", line 2: is no jinja template ("),
    ],
)
def test_a_template_that_is_none(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as found:
        read_template(str(path))
    assert str(found.value).startswith(f"task.chat_template={str(path)!r}") and message in str(found.value)
    assert "\n" not in str(found.value)


def test_a_template_of_ones_own(tmp_path: Path, models: Callable[[str], Path]) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE, encoding="utf-8")
    task = CHAT | {
        "dataset": {"train_file": "a.jsonl"},
        "metrics": ["loss"],
        "chat_template": str(tmp_path / "t.jinja"),
    }
    model = models("llama")
    config = parse_config(
        {"run": {"name": "x"}, "model": {"name_or_path": str(model)}, "task": task, "train": {"max_steps": 1}}
    )
    _, tokenizer = load_descriptions(config, str(model))
    assert tokenizer.chat_template == TEMPLATE
