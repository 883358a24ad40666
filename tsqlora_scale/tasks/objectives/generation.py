"""Text generation for evaluation: deterministic, and quiet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from tsqlora_scale.tasks.objectives.decoding import kept_settings


def generate_text(
    module: Any,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Tensor],
    *,
    prompt_length: int,
    max_new_tokens: int,
    num_beams: int,
    synced: bool,
    **options: Any,
) -> list[str]:
    """Beam search (greedy with one beam), decoded without special tokens.

    Args:
        module: a transformers or PEFT model in evaluation mode. Of its own generation settings those stay in force
            that :func:`.kept_settings` names and that are not set here.
        tokenizer: decodes.
        inputs: ``input_ids`` and ``attention_mask``, both (B, T).
        prompt_length: positions at the head of the output that are not the model's own words.
        max_new_tokens: the longest text, in tokens.
        num_beams: beams kept.
        synced: go on until every rank has finished, as parameters sharded over the ranks require.
        options: more of ``generate``'s arguments.
    """
    own = module.generation_config.to_dict()
    settings = kept_settings(own, num_beams=num_beams, is_encoder_decoder=module.config.is_encoder_decoder)
    ends = {"eos_token_id": _end_ids(own["eos_token_id"], tokenizer)}
    asked = GenerationConfig(
        **settings | ends | options, max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False, use_cache=True
    )
    with torch.no_grad(), _without_own_settings(module):
        tokens = module.generate(**inputs, generation_config=asked, synced_gpus=synced)
    return [read_back(tokenizer, row) for row in tokens[:, prompt_length:]]


def read_back(tokenizer: PreTrainedTokenizerBase, ids: Any) -> str:
    """Tokens as the text that they stand for: without special tokens, and with every blank that they have (a tokenizer
    may be set to take some away before signs, which targets do not do)."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()


def _end_ids(own: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """What ends a text: the model's own end tokens, and the tokenizer's, which the targets end with."""
    ids = [own] if isinstance(own, int) else own or []
    found = {i for i in [*ids, tokenizer.eos_token_id] if i is not None and i >= 0}
    return sorted(found) or None


@contextmanager
def _without_own_settings(module: Any) -> Iterator[None]:
    """Inside, the model has no generation settings: ``generate`` takes from them whatever it is not told."""
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own
