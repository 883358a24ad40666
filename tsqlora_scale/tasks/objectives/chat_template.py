"""What a tokenizer's chat template puts around a user's text and around the answer, found out by examples."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown

#: The day that templates are told where the config names none: the same text on every day.
USUAL_DATE = "2025-01-01"
#: Words that no template holds itself.
_QUESTION, _ANSWER = "qzvxw", "wxvzq"
_FORMATS = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBcdDeFHIjmMpSTuUVwWxXyYZ"]


@dataclass(frozen=True)
class ChatMarks:
    """A conversation of one turn: ``head + source + opening``, then ``lead + answer + closing``.

    Attributes:
        head: before the source: the system prompt, and the opening of the user's turn.
        opening: after the source, up to where the answer begins.
        lead: blanks before an answer.
        closing: end of the assistant's turn.
        strips: whether the template takes blanks from both ends of a text.
    """

    head: str
    opening: str
    lead: str
    closing: str
    strips: bool

    def prompt(self, source: str) -> str:
        """The conversation up to where the answer begins."""
        return self.head + (source.strip() if self.strips else source) + self.opening


def chat_marks(tokenizer: PreTrainedTokenizerBase, today: str | None = None) -> ChatMarks | None:
    """The marks of a tokenizer's template; None where it has none.

    Some templates open an answer with more than they give as generation prompt, such as an empty thought; that
    belongs to the prompt. Line ends after the end of the turn are left out: the model has stopped by then. A template
    that shows no answer tells nothing of its end.

    Args:
        today: what the template is told that the date is (``YYYY-MM-DD``).

    Raises:
        UserError: the template fails, or does not show the source as it is, once.
    """
    template = template_text(tokenizer)
    if template is None:
        return None
    fixed = with_date(template, today or USUAL_DATE)
    failures: list[Exception] = []
    for as_parts in (False, True):
        try:
            marks = _marks(_Renderer(tokenizer, fixed, as_parts))
        except Exception as error:  # of the template's own making, as raise_exception, or Jinja's
            failures.append(error)
            continue
        if marks is not None:
            return marks
    try:
        shows = _Renderer(tokenizer, fixed, False)(_QUESTION).replace(_QUESTION, "SOURCE")
    except Exception:
        reason = " ".join(str(failures[0]).split())[:300] or type(failures[0]).__name__
        raise UserError(
            f"the tokenizer's chat template fails on a turn of the user and one of the assistant ({reason}); {REMEDY}"
        ) from None
    raise UserError(
        "the tokenizer's chat template does not show the source once and as it is: of SOURCE it makes "
        f"{shown(shows, 200)}; {REMEDY}"
    )


#: What a user can do about a template.
REMEDY = "mend chat_template in the model's folder, or give another by task.chat_template"


def read_template(place: str) -> str:
    """The template in the file that ``task.chat_template`` names.

    Raises:
        UserError: naming the key: there is no such file, or it is no template.
    """
    key = f"task.chat_template={shown(place)}"
    try:
        text = Path(place).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: a home that is nobody's
        reason_given = getattr(error, "strerror", None) or error
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else reason_given
        raise UserError(f"{key}: cannot be read ({reason}); give a file with a jinja template") from None
    if not text.strip():
        raise UserError(f"{key}: holds nothing; write a template into it, or leave the key out")
    mistake: TemplateSyntaxError | None = None
    try:
        render_jinja_template([[]], chat_template=text)
    except TemplateSyntaxError as error:
        mistake = error
    except Exception:  # of a conversation without turns it need not make anything
        return text
    if mistake is not None:
        raise UserError(f"{key}, line {mistake.lineno}: is no jinja template ({mistake.message}); mend it")
    return text


def template_text(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template's text; None where there is none, or nothing in it."""
    if not tokenizer.chat_template:
        return None
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:  # several, and none is the default
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the tokenizer's chat template cannot be chosen ({reason}); {REMEDY}") from None
    return template if template.strip() else None


def with_date(template: str, today: str) -> str:
    """The template with ``strftime_now`` replaced by one that always says the same day, at midnight."""
    if "strftime_now" not in template:
        return template
    day = date.fromisoformat(today)
    filters = "".join(f" | replace({mark!r}, {day.strftime(mark)!r})" for mark in _FORMATS)
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"


class _Renderer:
    """Conversations of one turn as a template writes them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, as_parts: bool) -> None:
        self._tokenizer, self._template, self._as_parts = tokenizer, template, as_parts

    def __call__(self, question: str, answer: str | None = None) -> str:
        turns = [{"role": "user", "content": self._content(question)}]
        if answer is not None:
            turns.append({"role": "assistant", "content": self._content(answer)})
        text = self._tokenizer.apply_chat_template(
            turns, chat_template=self._template, tokenize=False, add_generation_prompt=answer is None
        )
        assert isinstance(text, str), "apply_chat_template(tokenize=False) returns text"
        return text

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._as_parts else text


def _marks(render: _Renderer) -> ChatMarks | None:
    """What is around the texts; None where the source is not shown once and as it is."""
    head, found, tail = render(_QUESTION).partition(_QUESTION)
    if not found or _QUESTION in tail:
        return None
    blank = f" \n{_QUESTION}\n{_QUESTION} \n"
    for strips in (False, True):
        if render(blank) == head + (blank.strip() if strips else blank) + tail:
            break
    else:
        return None
    whole = render(_QUESTION, _ANSWER)
    prompt = head + _QUESTION + tail
    before, found, after = whole.removeprefix(prompt).partition(_ANSWER)
    if not whole.startswith(prompt) or not found or _ANSWER in after:
        return ChatMarks(head, tail, "", "", strips)
    opening, lead = (before, "") if before.strip() else ("", before)
    return ChatMarks(head, tail + opening, lead, after.rstrip(), strips)
