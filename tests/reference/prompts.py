"""Slow and obviously correct: a prompt's text written out, one forward a row, the words' logits read off by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)


def word_scores(kind: str, folder: Path, prompts: list[str], words: list[str]) -> Tensor:
    """Logits (n, C) of words of one token each at the slot of prompts.

    Args:
        kind: ``masked``: the prompts hold ``<mask>``; ``causal`` and ``seq2seq``: the word is what comes next.
        folder: of a model of :mod:`tests.tiny`, whose tokenizer has a word a token.
    """
    auto = {"masked": AutoModelForMaskedLM, "causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}[kind]
    model, tokenizer = auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    with torch.no_grad():
        for prompt in prompts:
            ids = tokenizer(prompt)["input_ids"]
            if kind == "causal":
                ids = ids[:-1]  # without the end
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            elif kind == "seq2seq":
                target = tokenizer(text_target=words[0])["input_ids"]
                before = target[: target.index(_number(tokenizer, words[0]))]  # what comes before any target's words
                start = torch.tensor([[model.config.decoder_start_token_id, *before]])
                logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=start).logits[0, -1]
            else:
                logits = model(input_ids=torch.tensor([ids])).logits[0, ids.index(tokenizer.mask_token_id)]
            found.append(logits[[_number(tokenizer, word) for word in words]])
    return torch.stack(found)


def _number(tokenizer: PreTrainedTokenizerFast, word: str) -> int:
    return int(tokenizer.get_vocab()[word])
