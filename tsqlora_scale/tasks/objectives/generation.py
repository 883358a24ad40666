"""Text generation for evaluation: deterministic, and quiet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


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
        module: a transformers or PEFT model in evaluation mode. Its own generation config stays in force for
            what is not set here (such as ``no_repeat_ngram_size``).
        tokenizer: decodes.
        inputs: ``input_ids`` and ``attention_mask``, both (B, T).
        prompt_length: positions at the head of the output that are not the model's own words.
        max_new_tokens: the longest text, in tokens.
        num_beams: beams kept.
        synced: go on until every rank has finished, as parameters sharded over the ranks require.
        options: more of ``generate``'s arguments.
    """
    # transformers warns when both limits are set, so the one that the model's own config does not set is used
    if getattr(module.generation_config, "max_new_tokens", None) is None:
        options["max_length"] = prompt_length + max_new_tokens
    else:
        options["max_new_tokens"] = max_new_tokens
    with torch.no_grad():
        tokens = module.generate(
            **inputs, num_beams=num_beams, do_sample=False, use_cache=True, synced_gpus=synced, **options
        )
    texts = tokenizer.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
    return [text.strip() for text in texts]
