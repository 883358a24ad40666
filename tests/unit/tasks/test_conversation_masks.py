"""What is learned of a conversation is what generation marks in the template would say, without them.

The templates are those that public models come with. Their marked twins are the same templates with generation marks
about what the assistant says, as trainers that rely on these marks (TRL) need them.
"""

from __future__ import annotations

import itertools
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.unit.tasks.cases import LENGTHS, task_config
from tests.unit.tasks.vocabularies import SENTENCES, whole_text_bpe
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.tasks.objectives.conversation_tokens import ConversationTokens, _exchanges, inside
from tsqlora_scale.tasks.objectives.turn_spans import UnwrittenTurn

FOLDER = Path(__file__).parent / "chat_templates"
NAMES = sorted(path.name.removesuffix(".marked.jinja") for path in FOLDER.glob("*.marked.jinja"))
#: Begin and end tokens.
ENDS = {
    "chatml": ("<s>", "<|im_end|>"), "smollm2": ("<|im_start|>", "<|im_end|>"), "qwen2_5": ("<s>", "<|im_end|>"),
    "qwen3": ("<s>", "<|im_end|>"), "llama3": ("<|begin_of_text|>", "<|eot_id|>"), "phi3": ("<s>", "<|endoftext|>"),
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"), 
    "deepseekv3": ("<\uff5cbegin▁of▁sentence\uff5c>", "<\uff5cend▁of▁sentence\uff5c>"),
    "gemma": ("<bos>", "<eos>"),
}  # fmt: skip
#: What TRL's marks take in, though it is a part of what asks for an answer, and so the prompt's.
OF_THE_PROMPT = {"qwen2_5": "\n", "deepseekv3": "<\uff5cAssistant\uff5c>"}
NO_SYSTEM = ("gemma",)

TURNS = [
    [("user", "Is the film good?"), ("assistant", "It was dull.")],
    [("user", "a"), ("assistant", "user"), ("user", "assistant"), ("assistant", "a")],
    [("user", "the film"), ("assistant", "the film"), ("user", "the film"), ("assistant", "the film\nthe film")],
    [("user", " two\n\nlines "), ("assistant", "Ünïcode 😀 1234"), ("user", "?"), ("assistant", "(brackets) 😀")],
    [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5"), ("assistant", "6 7 8")],
]
SYSTEM = ("system", "You are a very good director.")


def template(name: str, *, marked: bool = False) -> str:
    return (FOLDER / f"{name}{'.marked' if marked else ''}.jinja").read_text(encoding="utf-8")


@cache
def tokenizer(name: str, kind: str = "bytes") -> PreTrainedTokenizerFast:
    """A tokenizer that has the marks of a template as its special tokens."""
    begin, end = ENDS.get(name, ("<s>", "</s>"))
    pattern = "<\\|\\w+\\|>|<\uff5c[^\uff5c<>]+\uff5c>|<(?:start|end)_of_turn>"
    marks = dict.fromkeys([begin, end, "<pad>", *re.findall(pattern, template(name))])
    if name == "zephyr":  # whose tokenizer has no others than Mistral's
        marks = dict.fromkeys([begin, end, "<pad>"])
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    else:
        made = whole_text_bpe().backend_tokenizer
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    out = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=begin, eos_token=end, pad_token="<pad>")
    out.chat_template = template(name)
    return out


def conversation(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def tokens_of(made: PreTrainedTokenizerFast, tmp_path: Path, **keys: Any) -> ConversationTokens:
    task = LENGTHS | {"type": "causal", "messages": "messages"} | keys
    return ConversationTokens(made, task_config(tmp_path, task))


def marked_by_template(
    name: str, made: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **more: Any
) -> tuple[list[int], list[bool]]:
    """Ids and masks as transformers, and so TRL, gets them from generation marks."""
    out = made.apply_chat_template(
        messages, chat_template=template(name, marked=True), return_dict=True, return_assistant_tokens_mask=True, **more
    )
    mask = [bool(m) for m in out["assistant_masks"]]
    text = made.apply_chat_template(messages, tokenize=False, **more)
    offsets = made(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for i in range(1, len(mask)):  # where two tokens are of one character, transformers marks the first of them alone
        mask[i] = mask[i] or (mask[i - 1] and offsets[i] == offsets[i - 1])
    part = OF_THE_PROMPT.get(name)
    if part is not None:
        for begin in [i for i, m in enumerate(mask) if m and not mask[i - 1]]:
            first = offsets[begin][0]
            assert text.startswith(part, first)
            for i in range(begin, len(mask)):
                mask[i] = mask[i] and offsets[i][1] > first + len(part)
                if mask[i]:
                    break
    return out["input_ids"], mask


def test_there_are_ten() -> None:
    assert len(NAMES) >= 10


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("name", NAMES)
def test_masks_are_those_of_generation_marks(name: str, kind: str, tmp_path: Path) -> None:
    made = tokenizer(name, kind)
    tokens = tokens_of(made, tmp_path)
    for turns in TURNS:
        for system in [[]] if name in NO_SYSTEM else [[], [SYSTEM]]:
            messages = conversation([*system, *turns])
            ids, mask = marked_by_template(name, made, messages)
            found = tokens.marked(messages, None, 10_000, 1)
            assert found.ids == ids
            assert found.learned == mask, (turns, made.convert_ids_to_tokens(ids))
            assert sum(mask) and not all(mask)
            last = tokens_of(made, tmp_path, loss_on="last").marked(messages, None, 10_000, 1)
            assert [i for i, m in enumerate(last.learned) if m] == [
                i for i, m in enumerate(mask) if m and i >= found.answer
            ]
            whole = tokens_of(made, tmp_path, loss_on="all").marked(messages, None, 10_000, 1)
            assert whole.learned == [False] + [True] * (len(ids) - 1)


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "look_up", "arguments": arguments}}


TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Is the film good?"},
    {"role": "assistant", "content": "", "tool_calls": [call(film="the film"), call(film="a film")]},
    {"role": "tool", "content": '{"stars": 1}'},
    {"role": "tool", "content": '{"stars": 2}'},
    {"role": "assistant", "content": "Dull.", "tool_calls": [call(film="dull")]},
    {"role": "tool", "content": "nothing"},
    {"role": "assistant", "content": "It is dull."},
    {"role": "user", "content": "And the plot?"},
    {"role": "assistant", "content": "Weak."},
]
THOUGHTS: list[dict[str, Any]] = [
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "It is 2.", "reasoning_content": "After 1 comes 2."},
    {"role": "user", "content": "3"},
    {"role": "assistant", "content": "<think>\nAnd then 4.\n</think>\n\nIt is 4."},
]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_calls_of_tools_are_the_assistants_and_results_are_not(name: str, tmp_path: Path) -> None:
    made = tokenizer(name)
    tokens = tokens_of(made, tmp_path)
    for length in (5, 7, 9):
        ids, mask = marked_by_template(name, made, CALLS[:length], tools=TOOLS)
        found = tokens.marked(CALLS[:length], TOOLS, 10_000, 1)
        assert (found.ids, found.learned) == (ids, mask)
        text = made.decode([i for i, m in zip(ids, mask, strict=True) if m])
        assert "look_up" in text and "stars" not in text and "parameters" not in text


def test_thoughts_are_learned_where_the_template_shows_them(tmp_path: Path) -> None:
    made = tokenizer("qwen3")
    tokens = tokens_of(made, tmp_path)
    for length in (2, 4):
        ids, mask = marked_by_template("qwen3", made, THOUGHTS[:length])
        found = tokens.marked(THOUGHTS[:length], None, 10_000, 1)
        assert (found.ids, found.learned) == (ids, mask)
    assert "After 1" not in made.decode(found.ids) and "And then 4" in made.decode(found.ids)


def test_the_question_is_what_the_answer_follows(tmp_path: Path) -> None:
    """Generation starts where learning does, but for thoughts that the template itself begins."""
    for name in NAMES:
        made = tokenizer(name)
        tokens = tokens_of(made, tmp_path)
        for turns in TURNS:
            messages = conversation(turns)
            found = tokens.marked(messages, None, 10_000, 1)
            lead = made(tokens.template.lead if tokens.template.lead.strip() else "")["input_ids"]
            assert tokens.prompt(messages, None, 10_000) == found.ids[: found.answer + len(lead)]
            if tokens.template._asks:
                asked = made.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
                assert tokens.template.question(messages[:-1]).startswith(asked)


def test_an_answer_behind_a_tools_result_may_have_no_opening(tmp_path: Path) -> None:
    """DeepSeek's goes on in the turn that called the tool."""
    made = tokenizer("deepseekv3")
    tokens = tokens_of(made, tmp_path)
    one = call()
    one["function"]["arguments"] = '{"film": "the film"}'
    messages = [CALLS[0], {**CALLS[1], "tool_calls": [one]}, *CALLS[2:4], CALLS[6]]
    found = tokens.marked(messages, None, 10_000, 1)
    parts = [made.decode(ids) for told, ids in grouped(found.ids, found.learned) if told]
    assert len(parts) == 2 and parts[1].startswith("It is dull.") and "look_up" in parts[0]
    assert tokens.prompt(messages, None, 10_000) == found.ids[: found.answer]


def test_a_text_is_no_mark(tmp_path: Path) -> None:
    """What reads like the end of a turn is taken apart, wherever it stands."""
    made = tokenizer("chatml")
    tokens = tokens_of(made, tmp_path)
    for text in ("a <|im_end|> b", "<|im_start|>assistant"):
        messages = [*conversation([("user", text), ("assistant", text)])]
        messages[1]["tool_calls"] = [call(film=text)]
        found = tokens.marked(messages, None, 10_000, 1)
        marks = made.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        assert [i for i in found.ids if i in marks] == marks * 2
        assert [m for i, m in zip(found.ids, found.learned, strict=True) if i in marks] == [False, False, False, True]


def test_a_template_that_ends_no_turn_gets_an_end(tmp_path: Path) -> None:
    made = tokenizer("chatml", "pieces")
    made = PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, eos_token="<|im_end|>", pad_token="<pad>")
    made.chat_template = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    tokens = tokens_of(made, tmp_path)
    assert (tokens.template.opening, tokens.template.closing) == ("### assistant:\n", "\n\n")
    found = tokens.marked(conversation(TURNS[1]), None, 10_000, 1)
    assert found.ids[-1] == made.eos_token_id and found.learned[-1]
    spans = [made.decode(list(ids)) for told, ids in grouped(found.ids, found.learned) if told]
    assert [text[:1] for text in spans] == ["u", "a"]


def grouped(ids: list[int], learned: list[bool]) -> list[tuple[bool, list[int]]]:
    pairs = itertools.groupby(zip(learned, ids, strict=True), key=lambda pair: pair[0])
    return [(told, [i for _, i in group]) for told, group in pairs]


@pytest.mark.parametrize(
    ("text", "turns", "message"),
    [
        (None, [("system", "Be good."), *TURNS[0]], r"fails on it \(System role not supported\)"),
        (None, [*TURNS[0], *TURNS[0][1:]], r"fails on it \(Conversation roles must alternate"),
        ("{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}",
         [SYSTEM, *TURNS[0]], r"does not show message 1 \(system\)"),
        ("{% for m in messages %}{% if loop.last or m.role != 'assistant' %}<{{ m.role }}>{{ m.content }}</s>"
         "{% endif %}{% endfor %}", TURNS[1], r"does not show message 2 \(assistant\)"),
        ("{% for m in messages %}<{{ m.role }}{% if not loop.last %} before{% endif %}>{{ m.content }}</s>{% endfor %}"
         "{% if add_generation_prompt %}<assistant>{% endif %}",
         TURNS[1], r"opens message 2 \(assistant\) otherwise than it asks for an answer"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if loop.last %}</s>{% elif loop.index == 2 %}<end>"
         "{% else %}<stop>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
         [SYSTEM, *TURNS[1]], r"closes message 3 \(assistant\) otherwise than other answers"),
    ],
)  # fmt: skip
def test_what_cannot_be_located_is_an_error(
    text: str | None, turns: list[tuple[str, str]], message: str, tmp_path: Path
) -> None:
    made = tokenizer("gemma") if text is None else whole_text_bpe()
    made.chat_template = text or template("gemma")
    tokens = tokens_of(made, tmp_path)
    with pytest.raises(UnwrittenTurn, match=message):
        tokens.check(conversation(turns), None, 1000, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "task.messages needs a chat template, and this tokenizer has none; put one"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not show question and answer once"),
        ("{{ raise_exception('never') }}", r"chat template fails on it \(never\); mend chat_template"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    made = whole_text_bpe()
    made.chat_template = text
    with pytest.raises(UserError, match=message):
        tokens_of(made, tmp_path)


@settings(max_examples=100)
@given(st.data())
def test_tokens_inside_spans(data: st.DataObject) -> None:
    """Against every character of every token."""
    edges = sorted(data.draw(st.lists(st.integers(0, 30), max_size=8, unique=True)))
    spans = list(zip(edges[::2], edges[1::2], strict=False))
    offsets, begin = [], 0
    for _ in range(data.draw(st.integers(0, 12))):
        begin += data.draw(st.integers(0, 2))
        offsets.append((begin, begin + data.draw(st.integers(0, 3))))
        begin = data.draw(st.sampled_from(offsets[-1]))  # tokens of one character share it
    slow = [any(a <= c < b for a, b in spans for c in range(*token)) for token in offsets]
    assert inside(offsets, spans) == slow


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 90), st.integers(0, 4), st.booleans(), st.sampled_from(["llama3", "chatml", "llama2"]))
def test_a_long_conversation_loses_its_oldest_exchanges(limit: int, turns: int, system: bool, name: str) -> None:
    made = tokenizer(name)
    tokens = tokens_of(made, Path("/nowhere"))
    messages = conversation([*([SYSTEM] if system else []), *TURNS[turns]])
    least = min(8, limit - 1)
    found = tokens.marked(messages, None, limit, least)
    whole = tokens.marked(messages, None, 10_000, 1)
    first = 1 if system else 0
    parts = [[*messages[:first], *messages[place:]] for place in range(first, len(messages), 2)]
    fits = [tokens.marked(part, None, 10_000, 1) for part in parts]
    fitting = [part for part in fits if len(part.ids) <= limit]
    assert len(found.ids) <= limit and any(found.learned) and not found.learned[0]
    if fitting:
        assert found == fitting[0]
    else:  # of the last exchange the answer's first tokens, and as much of the question's end as there may be
        last = fits[-1]
        answer = last.ids[last.answer :]
        assert found.ids[found.answer :] == answer[: len(found.ids) - found.answer]
        assert len(found.ids) - found.answer >= min(least, len(answer))
        *before, question, _ = parts[-1]
        ends = [question | {"content": question["content"][n:]} for n in range(len(question["content"]))]
        shorter = [tokens.marked([*before, end, parts[-1][-1]], None, 10_000, 1) for end in ends]
        begins = [made.ids[: made.answer] for made in [last, *shorter]]
        fit = [ids for ids in begins if len(ids) + min(least, len(answer)) <= limit]
        if fit:  # inside the template
            assert found.ids[: found.answer] in fit
            assert found.answer >= max(map(len, fit)) - 4, "at a token's beginning"
        else:
            assert len(found.ids) == limit
            assert found.ids[: found.answer] == last.ids[: last.answer][-found.answer :]
    assert (len(whole.ids) <= limit) == (found == whole)
    prompt = tokens.prompt(messages, None, limit)
    assert len(prompt) <= limit and prompt == tokens.prompt(
        [*messages[:-1], {"role": "assistant", "content": "?"}], None, limit
    )


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_an_exchange_with_long_results_keeps_the_template_s_beginning(name: str, tmp_path: Path) -> None:
    """The longest text that it is asked by is cut, and then the next one."""
    tokens = tokens_of(tokenizer(name), tmp_path)
    results = [{"role": "tool", "content": word * 400} for word in ("the film ", "a plot ", "dull ")]
    messages = [dict(zip(("role", "content"), SYSTEM, strict=True)), *CALLS[:2], *results, CALLS[-1]]
    whole = tokens.marked(messages, TOOLS, 100_000, 1)
    bare = [turn | {"content": "x"} if turn["role"] == "tool" else turn for turn in messages]
    least = len(tokens.marked(bare, TOOLS, 100_000, 1).ids)
    begins = whole.ids[: whole.ids.index(tokens._ids("film")[0])]
    for room in (20, 200, 900):
        found = tokens.marked(messages, TOOLS, least + room, 64)
        assert least <= len(found.ids) <= least + room
        assert found.ids[: len(begins)] == begins
        assert found.ids[found.answer :] == whole.ids[whole.answer :]
        prompt = tokens.prompt(messages, TOOLS, least + room)
        assert prompt[: len(begins)] == begins and len(prompt) <= least + room


def test_of_a_very_long_conversation_no_more_is_read_than_is_kept(tmp_path: Path) -> None:
    made = tokenizer("llama3")
    tokens = tokens_of(made, tmp_path)
    long = " ".join(["the film"] * 20_000)
    messages = conversation([("user", "a " + long), ("assistant", "good. " + long)])
    found = tokens.marked(messages, None, 64, 16)
    part = conversation([("user", long[-3000:].lstrip()), ("assistant", "good. " + long[:3000])])
    assert found == tokens.marked(part, None, 64, 16)
    short = tokens.marked(conversation([("user", "?"), ("assistant", "good.")]), None, 64, 16)
    assert found.ids[:4] == short.ids[:4], "the template's own beginning"
    assert sum(found.learned) == 16
    tokens.check(messages, None, 64, 16)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Qwen3.5's: what asks for an answer opens a thought, which earlier answers have not
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n"
            "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
            ["user<|im_end|>\n", "\n</think>\n\na<|im_end|>\n"],
        ),
        # GPT-OSS': the last answer ends by a mark of its own
        (
            "<|im_start|>system be good<|im_end|>{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
            "{{ '</s>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            ["user<|im_end|>", "a</s>"],
        ),
    ],
)
def test_earlier_answers_may_be_written_otherwise(text: str, expected: list[str], tmp_path: Path) -> None:
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer("chatml").backend_tokenizer, eos_token="<|im_end|>")
    made.add_special_tokens({"bos_token": "</s>"})
    made.chat_template = text
    tokens = tokens_of(made, tmp_path)
    found = tokens.marked(conversation(TURNS[1]), None, 10_000, 1)
    assert [made.decode(ids) for told, ids in grouped(found.ids, found.learned) if told] == expected


def test_a_developers_prompt_stays_as_a_systems_does() -> None:
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    for prompts in ([], ["system"], ["developer"], ["system", "developer"]):
        messages = [*({"role": role, "content": "y"} for role in prompts), *turns]
        assert _exchanges(messages) == (len(prompts), [len(prompts) + 2])


CALL = [{"id": "a", "type": "function", "function": {"name": "look_up", "arguments": {"film": "x"}}}]
KNOW_CALLS = {
    "deepseekv3": 'functionlook_up\n```json\n{"film": "x"}\n```',
    "qwen2_5": '<tool_call>\n{"name": "look_up", "arguments": {"film": "x"}}\n</tool_call>',
    "qwen3": '<tool_call>\n{"name": "look_up", "arguments": {"film": "x"}}\n</tool_call>',
}


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_a_template_hides_is_no_answer(name: str, tmp_path: Path) -> None:
    """Nor an empty one: a model would learn to say nothing. Where it is shown it is the reference."""
    tokens = tokens_of(tokenizer(name), tmp_path)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": CALL}]
    if name in KNOW_CALLS:
        assert tokens.answer(messages, None) == KNOW_CALLS[name]
        return
    with pytest.raises(UnwrittenTurn, match=r"does not show the call in message 2"):
        tokens.marked(messages, None, 10_000, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_last_answer_is_shown_with_its_thoughts(name: str, tmp_path: Path) -> None:
    tokens = tokens_of(tokenizer(name), tmp_path)
    said = "<think>\nlong\n</think>\n\nIt is 4."
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": said}]
    if name == "deepseekv3":
        with pytest.raises(UnwrittenTurn, match=r"does not show message 2 \(assistant\)"):
            tokens.marked(messages, None, 10_000, 1)
    else:
        assert tokens.answer(messages, None) == said
