"""What is learned of a conversation is what generation marks in the template would say, without them.

The templates are public ones. Those of ``cohere``, ``deepseekv3``, ``gemma``, ``llama3``, ``phi3``, ``qwen2_5`` and
``qwen3``, and the marked twins of all but the last, are TRL's (Apache 2.0), by which it trains on assistants alone.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.unit.tasks.cases import LENGTHS, task_config
from tests.unit.tasks.vocabularies import SENTENCES, whole_text_bpe
from tsqlora_scale.tasks.objectives.conversation_tokens import ConversationTokens

FOLDER = Path(__file__).parent / "chat_templates"
NAMES = sorted(path.name.removesuffix(".marked.jinja") for path in FOLDER.glob("*.marked.jinja"))
#: Begin and end tokens.
ENDS = {
    "chatml": ("<s>", "<|im_end|>"), "smollm2": ("<|im_start|>", "<|im_end|>"), "qwen2_5": ("<s>", "<|im_end|>"),
    "qwen3": ("<s>", "<|im_end|>"), "llama3": ("<|begin_of_text|>", "<|eot_id|>"), "phi3": ("<s>", "<|endoftext|>"),
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"), "deepseekv3": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "gemma": ("<bos>", "<eos>"),
}  # fmt: skip
#: What TRL's marks take in, though it is a part of what asks for an answer, and so the prompt's.
OF_THE_PROMPT = {"qwen2_5": "\n", "deepseekv3": "<｜Assistant｜>"}
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
    pattern = r"<\|\w+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>"
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
    """Ids and masks as TRL gets them."""
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
