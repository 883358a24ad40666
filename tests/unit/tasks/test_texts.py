"""Texts are read as texts, and no further than they are kept, by tokenizers of every kind."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.tiny import WORDS
from tests.unit.tasks.vocabularies import KINDS, MARKS
from tsqlora_scale.tasks.objectives import early_cut, tokenizing
from tsqlora_scale.tasks.objectives.prompts import PromptFormat
from tsqlora_scale.tasks.objectives.tokenizing import TextEncoder, special_ids

CHAT = (
    "{% for m in messages %}<mask>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<mask>assistant\n{% endif %}"
)
LITERALS = [mark for mark in MARKS if mark != "<unk>"]
WORDLIKE = st.one_of(st.sampled_from(WORDS), st.text("abcdefXYZé19.,;()中日\n\t", min_size=1, max_size=8))
LONG = st.lists(WORDLIKE, min_size=3, max_size=30).map(lambda words: " ".join(words * (1700 // len(words))))


@functools.cache
def trained(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


def made(kind: str) -> PreTrainedTokenizerFast:
    tokenizer = trained(kind)
    tokenizer.truncation_side, tokenizer.chat_template = "right", None
    return tokenizer


def count(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> int:
    return sum(number in special_ids(tokenizer) for number in ids)


@pytest.mark.parametrize("literal", LITERALS)
@pytest.mark.parametrize("kind", KINDS)
class TestMarks:
    def test_in_a_text(self, kind: str, literal: str) -> None:
        tokenizer, encoder = made(kind), TextEncoder(made(kind))
        texts = [f"the film {literal} is good", f"a{literal}b", literal, f"{literal} {literal}", "the film"]
        rows = encoder.rows(texts, max_length=64)["input_ids"]
        assert [count(tokenizer, row) for row in rows] == [2] * 5
        pairs = encoder.rows(texts, texts[::-1], max_length=64)["input_ids"]
        assert [count(tokenizer, row) for row in pairs] == [3] * 5
        targets = encoder.rows(texts, max_length=64, targets=True)["input_ids"]
        assert targets == rows
        assert all(not special_ids(tokenizer).intersection(row) and row for row in encoder.plain(texts))

    @pytest.mark.parametrize("template", [None, CHAT])
    def test_in_prompts_and_answers(self, kind: str, literal: str, template: str | None) -> None:
        tokenizer = made(kind)
        tokenizer.chat_template = template
        form = PromptFormat(tokenizer)
        empty, marked = form.prompts(["", f"the film {literal} is"], 100)
        assert count(tokenizer, marked) == count(tokenizer, empty)
        assert len(marked) > len(empty) + 3
        (answer,) = form.answers([f"good{literal} film {literal}"], 100)
        assert count(tokenizer, answer) == 1
        (cut,) = form.prompts([f"the film {literal} is " * 30], form.overhead + 20)
        assert count(tokenizer, cut) == count(tokenizer, empty)


@pytest.mark.parametrize("kind", KINDS)
def test_other_texts_are_as_the_tokenizer_reads_them(kind: str) -> None:
    tokenizer, encoder = made(kind), TextEncoder(made(kind))
    texts = ["the film < is good >", "Ünïcode, 1234 (brackets)", "a [ SEP ] b", "x" * 50]
    for limit in (5, 64):
        expected = tokenizer(texts, texts[::-1], truncation=True, max_length=limit)
        assert encoder.rows(texts, texts[::-1], max_length=limit) == dict(expected)
    assert encoder.plain(texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]


@settings(max_examples=8)
@given(LONG, st.integers(3, 40), st.sampled_from(["left", "right"]))
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_cut_early_to_the_same_tokens(kind: str, text: str, limit: int, side: str) -> None:
    tokenizer = made(kind)
    tokenizer.truncation_side = side
    encoder = TextEncoder(tokenizer)
    expected = tokenizer([text], truncation=True, max_length=limit)["input_ids"]
    assert encoder.rows([text], max_length=limit)["input_ids"] == expected
    short, limit = "the film is good", limit + 60  # tokenizers take pairs apart by the product of their overflows
    for pair in ([text], [short]), ([short], [text]):
        expected = tokenizer(*pair, truncation=True, max_length=limit + 2)["input_ids"]
        assert encoder.rows(*pair, max_length=limit + 2)["input_ids"] == expected
    half = text[: len(text) // 2]
    first, second = limit // 2, limit - limit // 2  # by hand, for the same reason
    kept = [
        ids[:size] if side == "right" else ids[-size:]
        for ids, size in zip(encoder.plain([half, text]), (first, second), strict=True)
    ]
    mark = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    both = encoder.rows([half], [text], max_length=limit + 3)["input_ids"]
    assert both == [[mark[0], *kept[0], mark[1], *kept[1], mark[1]]]


@settings(max_examples=6)
@given(text=LONG, limit=st.integers(3, 40), chat=st.booleans())
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prompt_is_cut_early_to_the_same_end(kind: str, text: str, limit: int, chat: bool) -> None:
    tokenizer = made(kind)
    tokenizer.chat_template = CHAT if chat else None
    form = PromptFormat(tokenizer)
    most = form.overhead + limit
    (found,), answers = form.prompts([text], most), form.answers([text], limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(early_cut, "is_long", lambda *_: False)
        patch.setattr(tokenizing, "is_long", lambda *_: False)
        (whole,) = form.prompts([text], most)
        assert answers == form.answers([text], limit)
    # how many tokens the first word takes beside the mark before it decides over the first token that is kept
    pieces = max(len(tokenizer.tokenize(f" {word}")) for word in set(text.split()))
    assert abs(len(found) - len(whole)) <= max(pieces, 2) and max(len(found), len(whole)) <= most
    same = min(len(found), len(whole)) - form.overhead
    assert same > 0 and found[-same:] == whole[-same:]


class _Counting:
    """A tokenizer that notes how much it has read."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer, self.read = tokenizer, 0

    def __call__(self, text: Any = None, text_pair: Any = None, **options: Any) -> Any:
        self.read += sum(map(len, [*(text or []), *(text_pair or [])]))
        return self._tokenizer(text, text_pair, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_megabyte_little_is_read(kind: str) -> None:
    text = "the film is very good, " * 50_000
    counting: Any = _Counting(made(kind))
    TextEncoder(counting).rows([text], max_length=128)
    TextEncoder(counting).rows([text], ["the plot"], max_length=128)
    assert counting.read < 20_000
    counting = _Counting(made(kind))
    form = PromptFormat(counting)
    form.prompts([text], 200)
    form.answers([text], 200)
    assert counting.read < 60_000


def test_a_text_without_blanks_is_left_whole() -> None:
    text = "".join(chr(0x4E00 + i % 5000) for i in range(40_000))
    assert early_cut.head(text, 10, len) is text
    assert early_cut.tail(text, 10, len) is text


def test_words_that_are_special_tokens_are_no_marks() -> None:
    """Someone's ``pad_token="film"``: films are still written about."""
    tokenizer = KINDS["words"]()
    tokenizer.pad_token = "film"
    assert tokenizer.convert_tokens_to_ids("film") not in special_ids(tokenizer)
    assert re.fullmatch(r"the f\w+", TextEncoder(tokenizer).broken("the film"))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_marks_in_a_long_source_cost_no_more_than_their_tokens(kind: str, chat: bool) -> None:
    """A mark is several tokens of a text: counted as one, a cut would take most of what is kept."""
    made = trained(kind)
    made.chat_template = CHAT if chat else None
    form, limit = PromptFormat(made), 60
    (ids,) = form.prompts(["film " * 200 + "</s> " * 30 + "good " * 40], limit)
    assert limit - 10 <= len(ids) <= limit
