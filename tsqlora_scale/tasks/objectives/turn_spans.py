"""Conversations as a chat template writes them, and where in the text the assistant speaks.

Templates may mark that place themselves (``{% generation %}``), and most do not. So it is found from outside: an answer
begins where the template, given the turns before it, asks for one, and ends where it goes on to the next turn. Where a
template writes a turn differently once others follow (Qwen3 takes old thoughts away, Phi-3 ends each text), the answer
is found by what changes when its content does. A place that none of this finds is an error, never a guess.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.tasks.objectives.chat_template import REMEDY, USUAL_DATE, template_text, with_date
from tsqlora_scale.tasks.rows.conversations import ASSISTANT, WEIGHT, Message

#: Characters (begin, end) of a text.
Span = tuple[int, int]
#: Words that no template holds itself, and a text that differs from any other in its first and its last character.
_FIRST, _SECOND, _ANSWER, _CHANGED = "qzvxw", "vqxwz", "wxvzq", "\ue000x\ue001"
_TURN_KEYS = ("tool_calls", "function_call")


class UnwrittenTurn(ValueError):
    """A conversation that the template cannot write, or of which it hides a turn; the message says which."""


class TurnTemplate:
    """A tokenizer's chat template.

    Attributes:
        opening: what stands before an answer, and is the prompt's.
        lead: what the template itself puts before an answer that is the last, such as an empty thought.
        closing: what ends an answer, whether or not another turn follows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, today: str | None = None) -> None:
        template = template_text(tokenizer)
        if template is None:
            raise UserError(
                "task.messages needs a chat template, and this tokenizer has none; put one into the model's folder "
                "(chat_template.jinja), or give texts by task.source and task.target"
            )
        self._calls_as_text: bool | None = None
        self._tokenizer, self._template = tokenizer, with_date(template, today or USUAL_DATE)
        failures = []
        for self._as_parts in (False, True):
            try:
                self._look()
                self._calls_as_text = self._wants_text()
                return
            except UnwrittenTurn as error:
                failures.append(error)
        raise UserError(f"task.messages: the tokenizer's chat template {failures[0]}; {REMEDY}")

    def write(self, messages: list[Message], tools: Any = None, *, asks: bool = False) -> str:
        """The conversation as text.

        Args:
            asks: end with what asks for an answer.

        Raises:
            UnwrittenTurn: the template fails.
        """
        turns: Any = [
            {
                key: self._called(message[key]) if key == "tool_calls" else message[key]
                for key in message
                if key != WEIGHT
            }
            for message in messages
        ]
        if self._as_parts:
            turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tools=tools, chat_template=self._template, tokenize=False, add_generation_prompt=asks
            )
        except Exception as error:  # of the template's own making, as raise_exception, or Jinja's
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UnwrittenTurn(f"fails on it ({reason})") from None
        assert isinstance(text, str), "apply_chat_template(tokenize=False) returns text"
        return text

    def question(self, messages: list[Message], tools: Any = None) -> str:
        """The turns before an answer, and what asks for it: all that the template writes before an answer that follows.

        Raises:
            UnwrittenTurn: the template fails, or an answer cannot be found.
        """
        answered = [*messages, {"role": ASSISTANT, "content": _ANSWER}]
        text = self.write(answered, tools)
        begin, _ = self._span(answered, len(messages), tools, text, 0)
        thought = bool(self.lead.strip()) and text.startswith(self.lead, begin)
        return text[: begin + len(self.lead)] if thought else text[:begin]

    def spans(self, messages: list[Message], tools: Any = None) -> tuple[str, list[Span]]:
        """The text, and where the assistant speaks in it: from behind what asks for an answer to the end of the turn.

        Args:
            messages: of which the last is the assistant's.

        Raises:
            UnwrittenTurn: the template fails, hides a turn, or an answer cannot be found.
        """
        text = self.write(messages, tools)
        found: list[Span] = []
        for place, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                _check_shown(place, message, text)
                continue
            after = found[-1][1] if found else 0
            begin, end = self._span(messages, place, tools, text, after)
            if not after <= begin < end <= len(text):
                raise UnwrittenTurn(f"does not show message {place + 1} ({ASSISTANT}) at a place of its own")
            found.append((begin, end))
            if message["content"].strip():
                if place == len(messages) - 1:  # of earlier answers some templates take the thoughts away
                    _check_shown(place, message, text[begin:end])
            elif not all(name in text[begin:end] for name in _called_names(message)):
                raise UnwrittenTurn(f"does not show the call in message {place + 1} ({ASSISTANT})")
        return text, found

    def _span(self, messages: list[Message], place: int, tools: Any, text: str, after: int) -> Span:
        begin = self._begin(messages[:place], tools, text)
        end: int | None = len(text) if place == len(messages) - 1 else None
        if end is None:
            so_far = self._written(messages[: place + 1], tools)
            end = len(so_far) if so_far and text.startswith(so_far) else None
        if begin is not None and end is not None:
            return begin, end
        content = self._content(messages, place, tools, text)
        begin = self._begin_before(content[0], text, after, place) if begin is None else begin
        calls = any(messages[place].get(key) for key in _TURN_KEYS)
        return begin, self._end_behind(content[1], text, place, calls=calls) if end is None else end

    def _begin(self, before: list[Message], tools: Any, text: str) -> int | None:
        """Where an answer begins by the turns before it, if the text begins with these."""
        asked = self._written(before, tools, asks=True) if self._asks else None
        if asked and text.startswith(asked):
            return len(asked)
        plain = self._written(before, tools)
        if plain is None or not text.startswith(plain):
            return None
        if text.startswith(plain + self.opening):
            return len(plain) + len(self.opening)
        # a turn that goes on behind a tool's result has no opening in some templates
        return len(plain) if before[-1]["role"] != "user" else None

    def _content(self, messages: list[Message], place: int, tools: Any, text: str) -> Span:
        """Where the content of a message is, found by changing it."""
        changed = [*messages[:place], {**messages[place], "content": _CHANGED}, *messages[place + 1 :]]
        other = self.write(changed, tools)
        begin = _common(text, other)
        end = len(text) - _common(text[begin:][::-1], other[begin:][::-1])
        if other[begin : begin + len(_CHANGED)] != _CHANGED:
            raise UnwrittenTurn(f"does not show message {place + 1} ({ASSISTANT})")
        return begin, end

    def _begin_before(self, content: int, text: str, after: int, place: int) -> int:
        opening, _ = self._earlier
        if not opening.strip():
            return max(after, len(text[:content].rstrip()))
        found = text.rfind(opening, after, content)
        if found < 0:
            raise UnwrittenTurn(f"opens message {place + 1} ({ASSISTANT}) otherwise than it asks for an answer")
        return found + len(opening)

    def _end_behind(self, content: int, text: str, place: int, *, calls: bool) -> int:
        _, closing = self._earlier
        found = content if not calls or closing is None else text.find(closing, content)
        if closing is None or found < 0 or not text.startswith(closing, found):
            raise UnwrittenTurn(f"closes message {place + 1} ({ASSISTANT}) otherwise than other answers")
        return found + len(closing)

    def _written(self, messages: list[Message], tools: Any, *, asks: bool = False) -> str | None:
        """A part of a conversation; None where the template writes no such part."""
        try:
            return self.write(messages, tools, asks=asks) if messages else None
        except UnwrittenTurn:
            return None

    def _wants_text(self) -> bool | None:
        """Whether the template takes a call's arguments for a text that it writes as it is (DeepSeek's, and the form in
        which OpenAI gives them), and not for an object that it writes as JSON, as most do; None: it writes neither."""
        found: dict[bool, str] = {}
        for as_text in (False, True):
            self._calls_as_text = as_text
            call = {"type": "function", "id": "a12345678", "function": {"name": _ANSWER, "arguments": {_SECOND: 1}}}
            asked = {"role": "user", "content": _FIRST}
            with contextlib.suppress(UnwrittenTurn):
                found[as_text] = self.write([asked, {"role": ASSISTANT, "content": "", "tool_calls": [call]}])
        as_python = str({_SECOND: 1})
        if not found:
            return None
        return True in found and (False not in found or as_python in found[False])

    def _called(self, calls: Any) -> Any:
        """Calls of tools with their arguments in the template's form, however the file gives them."""
        if not isinstance(calls, list):
            return calls
        return [
            {**call, "function": self._argued(call["function"])}
            if isinstance(call, dict) and isinstance(call.get("function"), dict)
            else call
            for call in calls
        ]

    def _argued(self, function: dict[str, Any]) -> dict[str, Any]:
        given = function.get("arguments")
        if self._calls_as_text and isinstance(given, dict | list):
            return {**function, "arguments": json.dumps(given, ensure_ascii=False)}
        if self._calls_as_text is False and isinstance(given, str):
            with contextlib.suppress(ValueError, RecursionError):
                read = json.loads(given)
                return {**function, "arguments": read} if isinstance(read, dict) else function
        return function

    def _look(self) -> None:
        """What the template puts around an answer, by examples."""
        first, answer = {"role": "user", "content": _FIRST}, {"role": ASSISTANT, "content": _ANSWER}
        base, asked, whole = self.write([first]), self.write([first], asks=True), self.write([first, answer])
        if base.count(_FIRST) != 1 or whole.count(_ANSWER) != 1 or _FIRST not in whole.partition(_ANSWER)[0]:
            shows = shown(whole.replace(_FIRST, "QUESTION").replace(_ANSWER, "ANSWER"), 200)
            raise UnwrittenTurn(f"does not show question and answer once and as they are: of the two it makes {shows}")
        before, _, after = whole.partition(_ANSWER)
        ended, asked, before = (text.partition(_FIRST)[2] for text in (base, asked, before))
        ended = ended if before.startswith(ended) else self._same_head(ended, before)
        asking = asked[len(ended) :] if asked.startswith(ended) else ""
        follow = before[len(ended) :]
        if asking.strip():
            self.opening = asking if follow.startswith(asking) else self._same_head(asking, follow)
        else:
            self.opening = follow if follow.strip() else ""
        self._asks = bool(asking.strip()) and self.opening == asking
        self.lead = follow[len(self.opening) :]
        self.closing = after
        self._earlier: tuple[str, str | None] = self.opening, after
        four = self._written([first, answer, {"role": "user", "content": _SECOND}, answer], None)
        if four is not None:
            self._look_at_earlier(base.partition(_FIRST)[0], ended, four)

    def _look_at_earlier(self, start: str, ended: str, four: str) -> None:
        """What is put around an answer that is followed by other turns, which may be written otherwise.

        Args:
            start: what is before a first question.
            ended: what ends a question.
            four: a conversation of two exchanges.
        """
        before, _, rest = four.partition(_FIRST)[2].partition(_ANSWER)
        between, opening, after = rest.partition(_SECOND)[0], before.removeprefix(ended), self.closing
        if not (opening.strip() and before.startswith(ended) and self.opening.startswith(opening)):
            opening = self.opening
        closing: str | None = after if between.startswith(after) else self._same_head(after, between)
        if closing and closing.strip():
            self.closing = closing
        elif after.strip():  # the last answer alone ends by this, as GPT-OSS's: take the next question's opening away
            asks = between[len(between) - _common(between[::-1], start[::-1]) :]
            asks = asks.removeprefix(ended) if ended.strip() else asks
            closing = between.removesuffix(asks) if asks else None
        self._earlier = opening, closing if closing or not after.strip() else None

    def _same_head(self, first: str, second: str) -> str:
        """The tokens that both texts begin with, as text: characters alone would cut marks that begin alike."""
        ids, offsets = self._tokens(first)
        others, _ = self._tokens(second)
        same = _common(ids, others)
        while same and not second.startswith(first[: offsets[same - 1][1]]):
            same -= 1
        return first[: offsets[same - 1][1]] if same else ""

    def _tokens(self, text: str) -> tuple[list[int], list[Span]]:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], encoded["offset_mapping"]


def _common(first: Any, second: Any) -> int:
    """How many items two sequences (texts, lists) begin with alike; by halves, as comparing slices is fast."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _called_names(message: Message) -> list[str]:
    """Names of the tools that a turn calls, as far as they can be read."""
    found = []
    for key in _TURN_KEYS:
        given: Any = message.get(key)
        for call in given if isinstance(given, list) else [given]:
            function = call.get("function", call) if isinstance(call, dict) else None
            name = function.get("name") if isinstance(function, dict) else None
            found += [name] if isinstance(name, str) else []
    return found


def _check_shown(place: int, message: Message, text: str) -> None:
    content = message["content"].strip()
    if content not in text and json.dumps(content)[1:-1] not in text and not _all_shown(content, text):
        raise UnwrittenTurn(f"does not show message {place + 1} ({message['role']})")


def _all_shown(content: str, text: str) -> bool:
    """Whether all words of a content are there: some templates write a tool's result anew."""
    return all(word.strip("{}[],:\"'") in text for word in content.split())
