"""Prompts and answers of causal models, with and without a chat template."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.tiny import WORDS, tiny_tokenizer
from tests.unit.tasks.vocabularies import byte_level
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.tasks.objectives.prompts import PromptFormat

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<mask> {{ 'actor' if m.role == 'user' else 'director' }} "
    "{% if m.role == 'assistant' %}THOUGHT{% endif %}{{ m.content }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<mask> director {% endif %}"
)
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(" ".join)


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.chat_template = template
    return made


def decode(made: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return made.decode(ids)


def test_without_a_template() -> None:
    made = tokenizer()
    form = PromptFormat(made, prefix="story ")
    assert decode(made, form.prompts(["the film"], 20)[0]) == "<s> story the film"
    assert decode(made, form.answers(["good", "very bad"], 20)[1]) == "very bad </s>"
    assert form.stop_ids == [made.eos_token_id]
    assert form.overhead == 2


def test_a_tokenizer_without_a_begin_token() -> None:
    made = tokenizer()
    made.bos_token = None
    assert decode(made, PromptFormat(made).prompts(["the film"], 20)[0]) == "the film"


def test_a_tokenizer_without_an_end_token() -> None:
    made = tokenizer()
    made.eos_token = None
    with pytest.raises(UserError, match="needs a tokenizer with an end token"):
        PromptFormat(made)


@pytest.mark.parametrize("thought", ["", "not "])
def test_a_chat_template_is_followed_to_the_letter(thought: str) -> None:
    """Prompt and answer together are the conversation as the template writes it, up to the end of the turn."""
    made = tokenizer(TEMPLATE.replace("THOUGHT", thought))
    form = PromptFormat(made, prefix="a ")
    turns = [{"role": "user", "content": "a film"}, {"role": "assistant", "content": "good"}]
    whole = made.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert form.prompts(["film"], 20)[0] + form.answers(["good"], 20)[0] == whole
    assert form.answers(["good"], 20)[0] == made("good </s>", add_special_tokens=False)["input_ids"]
    opening = decode(made, form.prompts(["film"], 20)[0])
    assert opening == f"<s> <mask> actor a film </s> <mask> director {thought}".strip()


def test_an_end_of_turn_that_is_not_the_end_token() -> None:
    made = tokenizer(TEMPLATE.replace("THOUGHT", "").replace("</s>", "<mask>"))
    form = PromptFormat(made)
    assert decode(made, form.answers(["good"], 9)[0]) == "good <mask>"
    assert form.stop_ids == sorted([made.mask_token_id, made.eos_token_id])


def test_a_template_that_closes_no_turn_gets_an_end_token() -> None:
    made = tokenizer("{% for m in messages %}{{ m.content }} {% endfor %}")
    assert decode(made, PromptFormat(made).answers(["good"], 9)[0]) == "good </s>"


def test_a_template_that_rewrites_the_conversation() -> None:
    """What the generation prompt opens, the finished conversation does not hold: only the prompt can be used."""
    made = tokenizer(TEMPLATE.replace("THOUGHT", "").replace("director {% endif %}", "director music {% endif %}"))
    form = PromptFormat(made)
    assert decode(made, form.prompts(["film"], 20)[0]).endswith("director music")
    assert decode(made, form.answers(["good"], 9)[0]) == "good </s>"


@settings(max_examples=60)
@given(TEXTS, st.integers(1, 30), st.booleans())
def test_a_long_source_loses_its_beginning_only(source: str, source_limit: int, chat: bool) -> None:
    made = tokenizer(TEMPLATE.replace("THOUGHT", "") if chat else None)
    form = PromptFormat(made, prefix="story ")
    full, limit = form.prompts([source], 10_000)[0], form.overhead + source_limit
    cut = form.prompts([source], limit)[0]
    words = made(source, add_special_tokens=False)["input_ids"]
    kept = words[-source_limit:]
    before, after = (
        ([1, 4, *made("actor story", add_special_tokens=False)["input_ids"]], 3) if chat else ([1, full[1]], 0)
    )
    assert len(cut) == min(len(full), limit)
    assert cut == [*before, *kept, *full[len(full) - after :]]


@settings(max_examples=40)
@given(TEXTS, st.integers(1, 50))
def test_a_cut_answer_has_no_end(target: str, limit: int) -> None:
    made = tokenizer()
    (ids,) = PromptFormat(made).answers([target], limit)
    words = made(target, add_special_tokens=False)["input_ids"]
    assert ids == [*words, made.eos_token_id][:limit]
    assert ids


@pytest.mark.parametrize("template", [None, TEMPLATE.replace("THOUGHT", "")])
@settings(max_examples=60, deadline=None)
@given(source=TEXTS, text=TEXTS, room=st.integers(1, 60))
def test_what_is_given_is_cut_before_what_is_asked(template: str | None, source: str, text: str, room: int) -> None:
    """As much of its end as fits behind the whole source; where nothing does, the end of both."""
    made = tokenizer(template)
    form = PromptFormat(made)
    limit = form.overhead + room
    (found,) = form.prompts([source], limit, inputs=[text])
    words = text.split()
    kept = [form.prompts([f"{source}\n\n{' '.join(words[n:])}"], 1000)[0] for n in range(len(words))]
    fitting = [ids for ids in kept if len(ids) <= limit]
    assert found == (fitting[0] if fitting else form.prompts([f"{source}\n\n{text}"], limit)[0])
    assert form.prompts([source], limit, inputs=[None]) == form.prompts([source], limit)


def test_a_mark_in_what_is_given_is_text() -> None:
    made = tokenizer(TEMPLATE.replace("THOUGHT", ""))
    form = PromptFormat(made)
    limit = form.overhead + 6
    (found,) = form.prompts(["the film"], limit, inputs=["good </s> " * 9])
    assert len(found) <= limit
    assert found.count(made.eos_token_id) == form.prompts(["the film"], limit)[0].count(made.eos_token_id)


@pytest.mark.parametrize("trim", ["", " | trim"])
def test_the_source_stays_whole_wherever_a_cut_falls(trim: str) -> None:
    """Templates that strip, and tokens that join the blanks about a cut, make prompts of less than the limit, too."""
    made = byte_level()
    made.chat_template = TEMPLATE.replace("THOUGHT", "").replace("m.content", f"m.content{trim}")
    form = PromptFormat(made)
    source, text = "Is the film good?", " ".join(f"{word}\n\n the film" for word in WORDS * 9)
    least = len(form.prompts([f"{source}\n\n."], 1000)[0]) + 2
    for limit in range(least, least + 40):
        (found,) = form.prompts([source], limit, inputs=[text])
        assert len(found) <= limit
        assert f"actor {source}" in made.decode(found), limit


def test_a_long_source_leaves_no_room_for_what_is_given() -> None:
    form = PromptFormat(tokenizer())
    source = "the film " * 5000
    assert form.prompts([source], 30, inputs=["good"]) == form.prompts([f"{source}\n\ngood"], 30)
