"""Chat templates of many makes: nothing of a source or an answer is lost, and what cannot be used is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from tests.tiny import tiny_tokenizer
from tests.unit.tasks.cases import ANSWERS, task_config
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.tasks import Task
from tsqlora_scale.tasks.objectives.chat_template import chat_marks, read_template, with_date
from tsqlora_scale.tasks.objectives.prompts import PromptFormat

TURNS = "{% for m in messages %}<mask>{{ m.role }} CONTENT</s>\n{% endfor %}"
OPENS = "{% if add_generation_prompt %}<mask>assistant {% endif %}"
PARTS = "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
STRING = "{{ m.content }}"
SYSTEM = "<mask>system You are a question and answer film.</s>\n"


def marks_of(template: Any, today: str | None = None) -> Any:
    made = tiny_tokenizer()
    made.chat_template = template
    return chat_marks(made, today)


@pytest.mark.parametrize(
    ("content", "strips"),
    [(STRING, False), ("{{ m.content | trim }}", True), (PARTS, False),
     ("{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}", False),
     ("{{ m['content'][0]['text'] }}", False)],
)  # fmt: skip
@pytest.mark.parametrize("system", ["", SYSTEM])
def test_source_and_answer_are_there_once(content: str, strips: bool, system: str) -> None:
    marks = marks_of(system + TURNS.replace("CONTENT", content) + OPENS)
    assert marks.prompt("  the film ").count("the film") == 1
    assert marks.strips == strips
    inner = "the film" if strips else "  the film "
    assert marks.prompt("  the film ") == f"{system}<mask>user {inner}</s>\n<mask>assistant "
    assert marks.closing == "</s>"


def test_a_template_without_a_generation_prompt() -> None:
    marks = marks_of(TURNS.replace("CONTENT", STRING))
    assert marks.prompt("film") == "<mask>user film</s>\n<mask>assistant "
    assert (marks.lead, marks.closing) == ("", "</s>")


def test_an_answer_that_the_template_drops_is_still_learned() -> None:
    made = tiny_tokenizer()
    made.chat_template = "{% for m in messages if m.role == 'user' %}<mask>{{ m.content }}</s>{% endfor %}" + OPENS
    form = PromptFormat(made)
    assert made.decode(form.answers(["good film"], 9)[0]) == "good film </s>"
    assert made.decode(form.prompts(["the plot"], 20)[0]).startswith("<mask> the plot </s>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('No system role') }}", r"fails on a turn .*\(No system role\); mend"),
        ("{{ messages[0].content.nothing.at_all }}", r"fails on a turn .*; mend chat_template"),
        ("{% for m in %}", r"fails on a turn of the user"),
        ("Hello", r"does not show the source once and as it is: of SOURCE it makes 'Hello'"),
        ("{% if messages[0].role == 'x' %}{{ messages }}{% endif %}", r"of SOURCE it makes ''; mend chat_template"),
        (TURNS.replace("CONTENT", STRING * 2), "does not show the source once"),
        (TURNS.replace("CONTENT", "{{ m.content | upper }}"), "does not show the source once"),
        (TURNS.replace("CONTENT", "{{ m.content | replace('\\n', ' ') }}"), "does not show the source once"),
        ({"tool_use": STRING, "rag": STRING}, r"cannot be chosen \(This model has multiple chat templates"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used_is_refused(template: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        marks_of(template)


@pytest.mark.parametrize("template", [None, "", " \n"])
def test_an_empty_template_is_none(template: str | None) -> None:
    made = tiny_tokenizer()
    made.chat_template = template
    assert chat_marks(made) is None
    assert made.decode(PromptFormat(made).prompts(["the film"], 9)[0]) == "<s> the film"


def test_one_of_several_templates_is_the_default() -> None:
    turns = TURNS.replace("CONTENT", STRING) + OPENS
    assert marks_of({"default": turns, "rag": "nothing"}) == marks_of(turns)


DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}'
    "{%- endif %}{%- endif %}\n<mask>system {{ date_string }}, {{ strftime_now('%-d.%m.%y %A %H:%M') }}</s>\n"
) + TURNS.replace("CONTENT", STRING)


def test_the_date_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tomorrow:
        @staticmethod
        def now() -> Any:
            raise AssertionError("the template has asked for the day")

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert marks_of(DATED).head == "<mask>system 01 Jan 2025, 1.01.25 Wednesday 00:00</s>\n<mask>user "
    assert marks_of(DATED, "2026-11-25").head.startswith("<mask>system 25 Nov 2026, 25.11.26 Wednesday")


def test_a_template_without_a_date_is_left_alone() -> None:
    template = TURNS.replace("CONTENT", STRING)
    assert with_date(template, "2025-01-01") is template


def test_the_configs_date_is_told(make_task: Callable[..., Task], tmp_path: Path) -> None:
    tsv = "source\ttarget\nthe film\tgood\n"
    with pytest.raises(ValueError, match="'2025-13-01' is no date; write it as 'YYYY-MM-DD'"):
        task_config(tmp_path, ANSWERS | {"chat_date": "2025-13-01"})
    with pytest.raises(ValueError, match="'chat_date' is for causal tasks, and 'type' is 'seq2seq'"):
        task_config(tmp_path, ANSWERS | {"chat_date": "2025-01-01", "type": "seq2seq"})
    task = make_task("llama", ANSWERS | {"chat_date": "2025-12-01"}, tsv)
    assert re.match(r"<s> the film", task.tokenizer.decode(task.batch([0]).inputs["input_ids"][0]))


def test_a_template_file_that_begins_with_a_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chat.jinja").write_bytes("\ufeff{{ messages }}".encode())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_template("~/chat.jinja") == "{{ messages }}"
