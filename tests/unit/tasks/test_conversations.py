"""Columns of conversations: every way of writing them, what is refused, and the batches that they become."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.unit.tasks.cases import ANSWERS, LENGTHS, task_config
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.report.input_preview import input_preview
from tsqlora_scale.tasks import IGNORED, Task, build_task, load_data, with_tokens
from tsqlora_scale.tasks.objectives.turn_spans import TurnTemplate
from tsqlora_scale.tasks.rows.cells import json_of
from tsqlora_scale.tasks.rows.conversations import MalformedCell, answerable, read_conversation, read_tools
from tsqlora_scale.tasks.rows.origin import Origin
from tsqlora_scale.tasks.rows.unlabelled import load_unlabelled

CHAT = LENGTHS | {"type": "causal", "messages": "messages"}
TEMPLATE = (
    "{% for m in messages %}<mask> {{ {'user': 'actor', 'assistant': 'director'}.get(m.role, m.role) }} "
    "{{ m.content }} </s>\n{% endfor %}{% if add_generation_prompt %}<mask> director {% endif %}"
)
TURNS = [
    {"role": "user", "content": "the film"},
    {"role": "assistant", "content": "very good"},
    {"role": "user", "content": "the plot"},
    {"role": "assistant", "content": "bad and dull"},
]
SHARED = [
    {"from": "human", "value": "the film", "weight": None},
    {"from": "gpt", "value": "very good", "weight": 1},
    {"from": "human", "value": "the plot", "weight": None},
    {"from": "gpt", "value": "bad and dull", "weight": None},
]
PARTS = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]

Make = Callable[..., Task]


@pytest.fixture
def chat_task(models: Callable[[str], Path], tmp_path: Path) -> Make:
    """A task on conversations, in a file of the test's folder, with the tokenizer of a tiny model."""

    def make(rows: Any, name: str = "train.jsonl", template: str = TEMPLATE, **keys: Any) -> Task:
        dataset = keys.pop("dataset", {})
        if isinstance(rows, list):
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        cfg = task_config(tmp_path, CHAT | keys, train_file=name, dev_file=name, **dataset)
        tokenizer = AutoTokenizer.from_pretrained(models("llama"))
        tokenizer.chat_template = template
        data = with_tokens(cfg, load_data(cfg, seed=0), tokenizer)
        return build_task(cfg, data, tokenizer, AutoConfig.from_pretrained(models("llama")))

    return make


def learned(task: Task, row: int = 0) -> str:
    targets = task.batch([row]).targets[0]
    return task.tokenizer.decode(targets[targets != IGNORED])


@pytest.mark.parametrize("turns", [TURNS, SHARED, PARTS], ids=["messages", "sharegpt", "parts"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "jsonl of texts"])
def test_every_way_of_writing_them(kind: str, turns: list[dict[str, Any]], chat_task: Make, tmp_path: Path) -> None:
    name = f"train.{kind.split()[0]}"
    path = tmp_path / name
    if kind == "jsonl":
        path.write_text(json.dumps({"messages": turns, "other": 1}) + "\n")
    elif kind == "json":
        path.write_text(json.dumps([{"messages": turns}], indent=1))
    elif kind == "csv":
        path.write_text('messages\n"' + json.dumps(turns).replace('"', '""') + '"\n')
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist([{"messages": turns}]), path)
    else:
        path.write_text(json.dumps({"messages": json.dumps(turns)}) + "\n")
    task = chat_task(None, name)
    assert learned(task) == "very good </s> bad and dull </s>"
    assert task.references([0]) == ["bad and dull"]
    assert task.texts([0]) == [("the film\nvery good\nthe plot", "bad and dull")]
    assert task.preview(0) == "user: the film | assistant: very good | user: the plot -> bad and dull"


def test_a_hub_dataset_of_lists(tmp_path: Path, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"messages": TURNS}, {"messages": TURNS[:2]}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    dataset = {"name": "some/chats", "dev_split": None, "train_file": None, "path": None}
    cfg = task_config(tmp_path, CHAT, **dataset)
    data = load_data(cfg, seed=0)
    assert [read_conversation(cell) for cell in data.train["messages"]] == [TURNS, TURNS[:2]]


def test_what_is_learned(chat_task: Make) -> None:
    assert learned(chat_task([{"messages": TURNS}], loss_on="last")) == "bad and dull </s>"
    whole = chat_task([{"messages": TURNS}], loss_on="all")
    assert learned(whole).startswith("actor the film </s>")
    batch = whole.batch([0])
    assert (whole.loss_terms(batch) == batch.inputs["attention_mask"].sum(1) - 1).all()


def test_batches_are_padded_and_what_follows_the_last_answer_is_left_out(chat_task: Make) -> None:
    task = chat_task([{"messages": [*TURNS[:2], {"role": "user", "content": "story"}]}, {"messages": TURNS}])
    batch = task.batch([0, 1, 0])
    assert batch.inputs["input_ids"].shape == batch.targets.shape
    assert batch.targets[0].tolist() == batch.targets[2].tolist()
    for i in range(2):
        alone = task.batch([i])
        width = alone.targets.shape[1]
        assert batch.targets[i, :width].tolist() == alone.targets[0].tolist()
        assert batch.inputs["attention_mask"][i].sum() == width
    assert "story" not in task.tokenizer.decode(batch.inputs["input_ids"][0])
    told = batch.targets != IGNORED
    assert (batch.targets[told] == batch.inputs["input_ids"][told]).all()
    assert batch.prompts is None


def test_the_model_is_asked_by_the_turns_before_the_last_answer(chat_task: Make) -> None:
    task = chat_task([{"messages": TURNS}, {"messages": TURNS[:2]}])
    prompts = task.batch([0, 1], split="dev").prompts
    assert prompts is not None
    texts = [task.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(*prompts.values(), strict=True)]
    assert texts[1] == "<mask> actor the film </s> <mask> director"
    assert (
        texts[0]
        == "<mask> actor the film </s> <mask> director very good </s> <mask> actor the plot </s> <mask> director"
    )
    assert prompts["attention_mask"][:, -1].all()


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_a_smaller_length_leaves_something_to_learn(loss_on: str, chat_task: Make) -> None:
    long = [{"role": "user", "content": "film " * 200}, TURNS[1]]
    steps = [*long, {"role": "tool", "content": "plot"}, TURNS[3]]  # of one exchange, in which much is learned
    task = chat_task([{"messages": long}, {"messages": TURNS}, {"messages": steps}], loss_on=loss_on)
    for limit in (2, 3, 5, 8, 48):
        batch = task.batch([0, 1, 2], max_length=limit)
        assert batch.targets.shape[1] <= limit
        assert (task.loss_terms(batch) > 0).all()
        assert (batch.targets[:, 0] == IGNORED).all()


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "row 2: the conversation in column 'messages' has no turn of the assistant; mend it, or set"),
        (TURNS[:1], "row 2: the conversation in column 'messages' has no turn of the assistant"),
        ([TURNS[0], TURNS[1] | {"content": " "}], r"row 2: .* has an empty message 2 \(assistant\); mend it, or set"),
        ([TURNS[0] | {"content": None}, TURNS[1]], r"row 2: .* has an empty message 1 \(user\)"),
    ],
)
def test_rows_without_anything_to_learn(
    turns: Any, message: str, chat_task: Make, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"messages": TURNS}, {"messages": turns}]
    with pytest.raises(UserError, match=message):
        chat_task(rows)
    with caplog.at_level(logging.WARNING, "tsqlora_scale"):
        assert len(chat_task(rows, dataset={"drop_empty": True})) == 1
    assert "1 rows with an empty text are left out" in caplog.text


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"role": "user"}, "column 'messages' holds .*; it must hold a list of messages"),
        ("the film", "column 'messages' holds 'the film', which is no JSON"),
        (["the film"], "holds 'the film' as message 1; it must be an object with role and content"),
        ([{"content": "x"}], "has a message 1 without a role; give it role and content, or from and value"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "has a message 1 of other parts than text"),
        ([{"from": "function_call", "value": "[1]"}], "a message 1 whose call of a tool is no object with name"),
    ],
)
def test_malformed_cells_are_named_and_never_dropped(cell: Any, message: str, chat_task: Make) -> None:
    rows = [{"messages": TURNS}, {"messages": cell}]
    for drop in (False, True):
        with pytest.raises(UserError, match=rf"train.jsonl, row 2: .*{message}"):
            chat_task(rows, dataset={"drop_empty": drop})


def test_rows_that_the_template_does_not_write(chat_task: Make, caplog: pytest.LogCaptureFixture) -> None:
    fails = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    rows = [{"messages": TURNS}, {"messages": [{"role": "system", "content": "story"}, *TURNS]}]
    with pytest.raises(UserError, match=r"train.jsonl, row 2: .* fails on it \(no system\); mend it, or set task"):
        chat_task(rows, template=fails)
    with caplog.at_level(logging.WARNING, "tsqlora_scale"):
        assert len(chat_task(rows, template=fails, dataset={"drop_empty": True})) == 1
    assert r"(the first is row 2: the tokenizer's chat template fails on it (no system)) are left out" in caplog.text
    with pytest.raises(UserError, match="every row is one that the chat template does not write"):
        chat_task(rows[1:], template=fails, dataset={"drop_empty": True})
    with pytest.raises(UserError, match=r"task\.messages needs a chat template"):
        chat_task(rows, template=None)


def test_tools_are_told_to_the_template(chat_task: Make) -> None:
    template = "{% if tools %}{% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}" + TEMPLATE
    tools = [{"type": "function", "function": {"name": "music"}}, {"type": "function", "function": {"name": "script"}}]
    rows = [{"messages": TURNS, "tools": tools}, {"messages": TURNS, "tools": None}, {"messages": TURNS}]
    task = chat_task(rows, template=template, tools="tools")
    texts = [task.tokenizer.decode(task.batch([i]).inputs["input_ids"][0]) for i in range(3)]
    assert texts[0] == f"music script {texts[1]}" and texts[1] == texts[2]
    assert learned(task) == "very good </s> bad and dull </s>"
    assert read_tools(json.dumps([json.dumps(tools[0])])) == tools[:1]
    with pytest.raises(UserError, match=r"row 1: column 'tools' holds .*; it must hold a list of JSON schemas"):
        chat_task([{"messages": TURNS, "tools": {"name": "music"}}], tools="tools")


def test_calls_of_sharegpt() -> None:
    call = {"name": "look_up", "arguments": {"film": "x"}}
    cell = [{"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": {"stars": 2}}]
    assert read_conversation(json.dumps(cell)) == [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": '{"stars": 2}'},
    ]
    with pytest.raises(MalformedCell, match="nested too deep"):
        read_conversation("[" * 100_000)


def test_the_preview_shows_masks(chat_task: Make) -> None:
    task = chat_task([{"messages": TURNS}])
    shown, lengths, told = input_preview(task, seed=1)
    assert shown.endswith("director[[very good </s>]]<mask> actor the plot </s> <mask> director[[bad and dull </s>]]")
    assert lengths.startswith("conversation: 21 / 21 / 21 / 21 tokens")
    assert lengths.endswith("48 are kept: 0% lose their oldest exchanges")
    assert told.startswith("of them learned: 7 / 7 / 7 / 7 tokens")


def test_rows_to_be_answered(tmp_path: Path) -> None:
    rows = [TURNS[:3], TURNS, [], [{"role": "user", "content": " "}]]
    file = tmp_path / "new.jsonl"
    file.write_text("".join(json.dumps({"messages": row, "n": 1}) + "\n" for row in rows))
    found = load_unlabelled(task_config(tmp_path, CHAT), file)
    assert found.filled.tolist() == [True, True, False, False]
    assert found.data.dev is not None
    assert [read_conversation(cell)[:-1] for cell in found.data.dev["messages"]][:2] == [TURNS[:3]] * 2


def test_a_digest_and_lengths(chat_task: Make) -> None:
    task, other = chat_task([{"messages": TURNS}]), chat_task([{"messages": TURNS[:2]}], "other.jsonl")
    assert task.digest() != other.digest()
    assert task.lengths()[0] > other.lengths()[0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "a"}, "'source' goes with texts, and 'messages' names whole conversations; remove one"),
        ({"prefix": "a"}, "'prefix' goes with texts"),
        ({"messages": None, "tools": "t", "source": "a", "target": "b"}, "'tools' is for tasks with 'messages'"),
        ({"messages": None, "loss_on": "all", "source": "a", "target": "b"}, "'loss_on' is for tasks with 'messages'"),
        ({"type": "seq2seq", "source": "a", "target": "b"}, "'messages' is for causal tasks, and 'type' is 'seq2seq'"),
        ({"messages": None}, "'source' and 'target' must name .*, or 'messages' one of conversations"),
        ({"loss_on": "first"}, "loss_on"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        task_config(tmp_path, CHAT | keys)


def test_no_place_for_a_prompt(chat_task: Make) -> None:
    with pytest.raises(UserError, match=r"task\.max_length=16 leaves nothing before an answer of task\.max_target"):
        chat_task([{"messages": TURNS}], max_length=16)


def test_alpacas_input_follows_the_instruction(make_task: Make, tmp_path: Path) -> None:
    tsv = "instruction\tinput\toutput\nthe film\tis dull\tgood\nthe film\t \tgood\n"
    keys = {"source": "instruction", "input": "input", "target": "output"}
    task = make_task("llama", ANSWERS | keys, tsv)
    texts = [task.tokenizer.decode(task.batch([i]).inputs["input_ids"][0]) for i in range(2)]
    assert texts == ["<s> the film is dull good </s>", "<s> the film good </s>"]
    assert task.texts([0]) == [("the film", "is dull", "good")]
    assert task.preview(0) == "the film is dull -> good"
    (tmp_path / "new.jsonl").write_text('{"instruction": "the film"}\n{"instruction": "a", "input": "b"}\n')
    found = load_unlabelled(task_config(tmp_path, ANSWERS | keys), tmp_path / "new.jsonl")
    assert found.filled.tolist() == [True, True]


CALLED = [
    {"role": "user", "content": "the film", "tool_calls": None},
    {
        "role": "assistant",
        "content": "very good",
        "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"city": "Rome", "n": 1}}}],
    },
]
CALLING = (
    "{% for m in messages %}<mask> {{ m.role }} {{ m.content }}{% for c in m.tool_calls or [] %} "
    "ARGS {% endfor %} </s>\n{% endfor %}{% if add_generation_prompt %}<mask> assistant {% endif %}"
)


@pytest.mark.parametrize("wants_text", ["", "joins", "writes"])
@pytest.mark.parametrize("as_text", [False, True])
def test_arguments_of_a_call_are_in_the_templates_form(
    wants_text: str, as_text: bool, models: Callable[[str], Path]
) -> None:
    """Most templates write an object as JSON; some put a text there, the form in which OpenAI's files have it."""
    arguments = "c.function.arguments"
    forms = {"": f"{arguments} | tojson", "joins": f"'>' + {arguments}", "writes": arguments}
    written = f"{{{{ {forms[wants_text]} }}}}"
    tokenizer = AutoTokenizer.from_pretrained(models("llama"))
    tokenizer.chat_template = CALLING.replace("ARGS", written)
    given: Any = json.loads(json.dumps(CALLED))
    function = given[1]["tool_calls"][0]["function"]
    if as_text:
        function["arguments"] = json.dumps(function["arguments"])
    text = TurnTemplate(tokenizer).write(read_conversation(json.dumps(given)))
    assert '{"city": "Rome", "n": 1}' in text
    assert '\\"' not in text


def test_objects_that_a_data_set_keeps_as_json(tmp_path: Path) -> None:
    """``datasets`` does so where keys differ from row to row, which those of tools always do."""
    schemas = [
        [{"name": "find", "parameters": {"properties": {"city": {"type": "string"}}}}],
        [{"name": "count", "parameters": {"properties": {"n": {"type": "integer"}, "m": {"type": "integer"}}}}],
    ]
    path = tmp_path / "train.jsonl"
    differing = [[TURNS[0], TURNS[1] | {"weight": 1}], CALLED]
    path.write_text(
        "".join(json.dumps({"messages": m, "tools": s}) + "\n" for m, s in zip(differing, schemas, strict=True))
    )
    dataset = {"name": str(tmp_path), "dev_split": None, "train_file": None, "path": None}
    data = load_data(task_config(tmp_path, CHAT | {"tools": "tools"}, **dataset), seed=0)
    assert [read_tools(cell) for cell in data.train["tools"]] == schemas
    found = [read_conversation(cell) for cell in data.train["messages"]]
    assert found[0][1]["weight"] == 1
    assert found[1][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "n": 1}


def test_dates_categories_and_views(tmp_path: Path, chat_task: Make) -> None:
    """A turn with a time of its own, and lists that are kept by number."""
    moment = datetime(2025, 3, 1, 12)
    turns = [turn | {"at": moment} for turn in TURNS]
    tools = pa.array([json.dumps([{"name": "find"}])] * 2).dictionary_encode()
    table = pa.table({"messages": [turns, turns[:2]], "tools": tools})
    pq.write_table(table, tmp_path / "train.parquet")
    task = chat_task(None, "train.parquet", tools="tools")
    assert learned(task) == "very good </s> bad and dull </s>"
    view = json_of(pa.array(["[1]", None]).cast(pa.string_view()))
    assert view is not None
    assert view.to_pylist() == ["[1]", None]


def test_half_a_character_is_named(chat_task: Make) -> None:
    broken = json.dumps([{"role": "user", "content": "cut \ud83d"}, TURNS[1]])
    whole = json.dumps([{"role": "user", "content": "all \U0001f600"}, TURNS[1]])
    assert read_conversation(whole)[0]["content"] == "all \U0001f600"
    with pytest.raises(UserError, match=r"row 2: column 'messages' holds .* with half of a surrogate pair"):
        chat_task([{"messages": whole}, {"messages": broken}])


def test_what_can_be_answered() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    asked = {"role": "user", "content": "the film"}
    rows = [
        [asked], [asked, call, {"role": "tool", "content": ""}], [{"role": "user", "content": " "}],
        [asked, call, {"role": "tool", "content": "2"}, {"role": "assistant", "content": "x"}], [],
    ]  # fmt: skip
    cells, filled = answerable(pa.chunked_array([[json.dumps(row) for row in rows]]), "messages", where=Origin("x"))
    assert filled.tolist() == [True, True, False, True, False], "a tool's result may be empty"
    assert [len(json.loads(cell)) for cell in cells.to_pylist()] == [2, 4, 2, 4, 2]
