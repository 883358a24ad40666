"""Conversations as token ids of a bounded length, and which of them are learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.objectives.early_cut import head, is_long, longest_end, tail
from tsqlora_scale.tasks.objectives.generation import read_back
from tsqlora_scale.tasks.objectives.tokenizing import TextEncoder
from tsqlora_scale.tasks.objectives.turn_spans import Span, TurnTemplate, UnwrittenTurn
from tsqlora_scale.tasks.rows.conversations import ASSISTANT, PROMPTS, Message, is_learned, up_to_last_answer

Tools = list[dict[str, Any]] | None
T = TypeVar("T")
#: Tokens that a tokenizer may put beside those of a text.
_MARGIN = 8


@dataclass(frozen=True)
class Marked:
    """A conversation's T tokens.

    Attributes:
        ids: of the tokens.
        learned: which of them are.
        answer: where the last answer begins.
    """

    ids: list[int]
    learned: list[bool]
    answer: int

    def cut(self, limit: int, answer_limit: int) -> Marked:
        """At most ``limit`` tokens: what is before the last answer loses its beginning, and the answer its end.

        Of them the answer has ``answer_limit``, or more where what is before it needs less.
        """
        end = self.answer + max(answer_limit, limit - self.answer)
        end = min(end, len(self.ids))
        begin = max(0, end - limit)
        learned = [False, *self.learned[begin + 1 : end]]  # nothing before the first token says what it should be
        return Marked(self.ids[begin:end], learned, self.answer - begin)


class ConversationTokens:
    """A tokenizer and its chat template as what conversations are put through.

    A conversation that is too long loses its oldest exchanges, from a turn of the user to the next, while its system
    prompt stays; of one exchange that is still too long the longest text that is asked by loses its beginning, inside
    the template's marks, and the last answer its end, as the texts of tasks with ``source`` and ``target`` do. So the
    last answer is always learned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cfg: TaskConfig) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("task.messages needs a tokenizer with an end token (eos_token); this one has none")
        self._tokenizer, self._loss_on = tokenizer, cfg.loss_on
        self._texts = TextEncoder(tokenizer)
        self.template = TurnTemplate(tokenizer, cfg.chat_date)
        closing = self._ids(self.template.closing.rstrip())
        self._end = int(tokenizer.eos_token_id)
        #: Whether the template ends an answer; one that does not gets an end token.
        self._closes = bool(closing) and closing[-1] in tokenizer.added_tokens_decoder
        #: Tokens that end a generated answer.
        self.stop_ids = sorted({self._end, *(closing[-1:] if self._closes else [])})

    def marked(self, messages: list[Message], tools: Tools, limit: int, answer_limit: int) -> Marked:
        """A conversation's tokens, at most ``limit``.

        Raises:
            UnwrittenTurn: the template does not write it, or hides a turn.
        """
        messages = self._plain(up_to_last_answer(messages))

        def made_of(part: list[Message]) -> Marked:
            return self._whole(part, tools, limit)

        def over(made: Marked) -> int:
            return made.answer - (limit - min(len(made.ids) - made.answer, answer_limit))

        found = self._shortest(messages, limit, made_of, lambda made: len(made.ids))
        if len(found.ids) > limit and over(found) > 0:
            found = self._with_less_asked(messages, limit, made_of, over) or found
        return found.cut(limit, answer_limit)

    def answer(self, messages: list[Message], tools: Tools) -> str:
        """What a model should write as the last message, an answer, as it is read: without special tokens.

        Raises:
            UnwrittenTurn: the template does not write it, or hides a turn.
        """
        text, spans = self.template.spans(self._plain(messages), self._without_marks(tools))
        begin, end = spans[-1]
        lead = self.template.lead
        begin += len(lead) if lead.strip() and text.startswith(lead, begin) else 0  # which is the prompt's
        ids = self._tokenizer(text[begin:end], add_special_tokens=False, verbose=False)["input_ids"]
        return read_back(self._tokenizer, ids)

    def prompt(self, messages: list[Message], tools: Tools, limit: int) -> list[int]:
        """The tokens before the last answer, at most ``limit``, which do not depend on it.

        Raises:
            UnwrittenTurn: the template does not write them.
        """
        messages = self._plain(up_to_last_answer(messages)[:-1])

        def written(part: list[Message]) -> list[int]:
            return self._ids(tail(self.template.question(part, self._without_marks(tools)), limit, self._length))

        found = self._shortest(messages, limit, written, len)
        if len(found) > limit:
            found = self._with_less_asked(messages, limit, written, lambda made: len(made) - limit) or found
        return found[-limit:]

    def check(self, messages: list[Message], tools: Tools, limit: int, answer_limit: int) -> None:
        """Check that a conversation can be learned from; most without tokenizing them.

        Raises:
            UnwrittenTurn: the template does not write it, hides a turn, or nothing of it is learned.
        """
        kept = self._plain(up_to_last_answer(messages))
        text, spans = self.template.spans(kept, tools)
        begin, end = spans[-1]
        solid = text[begin:end].strip() and begin > 0
        if not solid or len(text.encode()) + _MARGIN > limit:  # no token of a text is less than a byte
            found = self.marked(messages, tools, limit, answer_limit)
            if not any(found.learned):
                raise UnwrittenTurn(f"leaves no token to be learned among the {len(found.ids)} that are kept")

    def length(self, messages: list[Message], tools: Tools, most: int) -> tuple[int, int]:
        """Tokens of a whole conversation, and how many of them are learned; no more than about ``most`` are counted."""
        made = self._whole(self._plain(up_to_last_answer(messages)), tools, most)
        return len(made.ids), sum(made.learned[1:])

    def _shortest(
        self, messages: list[Message], limit: int, make: Callable[[list[Message]], T], size: Callable[[T], int]
    ) -> T:
        """What is made of a conversation that has lost as few exchanges as let it fit; of the last alone if none do."""
        whole = make(messages)
        if size(whole) <= limit:
            return whole
        first, asked = _exchanges(messages)
        low, high = 0, len(asked)
        fitting: T | None = None
        last = whole
        while low < high:
            middle = (low + high) // 2
            try:
                last = make([*messages[:first], *messages[asked[middle] :]])
            except UnwrittenTurn:  # a template that wants the turns before
                return fitting or whole
            if size(last) <= limit:
                fitting, high = last, middle
            else:
                low = middle + 1
        return fitting or last

    def _with_less_asked(
        self, messages: list[Message], limit: int, make: Callable[[list[Message]], T], over: Callable[[T], int]
    ) -> T | None:
        """What is made of the last exchange when the longest text that it is asked by has lost as much of its beginning
        as lets it fit, and where that is not enough the next one, too; None where nothing of them would be left, or the
        template does not write that.

        Args:
            over: by how many tokens what is made is too long.
        """
        first, asked = _exchanges(messages)
        part = [*messages[:first], *messages[asked[-1] if asked else first :]]
        asking = [place for place, turn in enumerate(part) if turn["role"] not in (*PROMPTS, ASSISTANT)]
        asking = [place for place in asking if isinstance(part[place]["content"], str)]
        for place in sorted(asking, key=lambda one: -len(part[one]["content"])):
            text, offsets = self._texts.with_offsets(tail(part[place]["content"], limit, self._length))
            before, turn, after = part[:place], part[place], part[place + 1 :]

            def made_of(end: str, before: Any = before, turn: Any = turn, after: Any = after) -> T:
                return make([*before, turn | {"content": end}, *after])

            try:
                if (made := longest_end(text, offsets, made_of, over)) is not None:
                    return made
            except UnwrittenTurn:
                return None
            if offsets:
                part = [*before, turn | {"content": text[offsets[-1][0] :]}, *after]
        return None

    def _whole(self, messages: list[Message], tools: Tools, limit: int) -> Marked:
        """All tokens of a conversation, but of a very long one no more than ``limit`` on each side of the last answer's
        beginning, and some."""
        text, spans = self.template.spans(messages, self._without_marks(tools))
        begin = spans[-1][0]
        if is_long(text, limit):
            before, after = tail(text[:begin], limit, self._length), head(text[begin:], limit, self._length)
            lost, text = begin - len(before), before + after
            spans = [(max(first - lost, 0), min(last - lost, len(text))) for first, last in spans]
            begin -= lost
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        answers = [message for message in messages if message["role"] == ASSISTANT]
        told = [span for span, message in zip(spans, answers, strict=True) if is_learned(message)]
        wanted = {"all": [(0, len(text))], "last": spans[-1:], "assistant": told}[self._loss_on]
        learned = inside(offsets, wanted)
        answer = inside(offsets, [(begin, len(text))])
        start = answer.index(True) if True in answer else len(ids)
        if not self._closes:
            ids, learned = [*ids, self._end], [*learned, True]
        return Marked(ids, learned, start)

    def _plain(self, messages: list[Message]) -> list[Message]:
        """The messages with a blank in everything in them that would be read as a special token."""
        return [self._without_marks(message) for message in messages]

    def _without_marks(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._texts.among_marks(value)
        if isinstance(value, dict):
            return {key: self._without_marks(inner) for key, inner in value.items()}
        return [self._without_marks(inner) for inner in value] if isinstance(value, list) else value

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _length(self, text: str) -> int:
        return len(self._ids(text))


def _exchanges(messages: list[Message]) -> tuple[int, list[int]]:
    """Where the system prompt ends, and where exchanges after the first one begin."""
    first = next((place for place, turn in enumerate(messages) if turn["role"] not in PROMPTS), len(messages))
    asked = [
        place
        for place in range(first + 1, len(messages))
        if messages[place]["role"] == "user" and messages[place - 1]["role"] != "user"
    ]
    return first, asked


def inside(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """Which tokens (T,) have a character in one of the spans, which are in order and do not overlap.

    Args:
        offsets: begin and end of every token's characters, in order.
    """
    found, place = [], 0
    for begin, end in offsets:
        while place < len(spans) and spans[place][1] <= begin:
            place += 1
        found.append(place < len(spans) and begin < end and end > spans[place][0])
    return found
