"""What every objective asks of a tokenizer; the tokenizer's own settings are left as they are."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills short rows: the pad token, else the end token (always masked, so any id would do)."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], pairs: list[str] | None = None, *, max_length: int
) -> dict[str, list[list[int]]]:
    """Token ids, masks and segment ids with special tokens, cut to ``max_length``, not yet padded."""
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    return {name: encoded[name] for name in encoded}


def check_lengths(cfg: TaskConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
    """Check the task's lengths against a model that has a fixed number of positions.

    Models with relative or rotary positions alone (T5, DeBERTa-v3, Llama) are not limited by their config.

    Raises:
        UserError: naming the key, its value and the limit. Without the check the run would end at its first
            long sample, with an index error deep in the model.
    """
    positions = getattr(model_config, "max_position_embeddings", None)
    rotary = any(getattr(model_config, name, None) is not None for name in ("rope_parameters", "rope_theta"))
    absolute = getattr(model_config, "position_biased_input", not rotary)  # DeBERTa says whether it adds them
    if not isinstance(positions, int) or not absolute:
        return
    limit = min(positions, tokenizer.model_max_length)  # RoBERTa's positions include two that no token can have
    keys = ("max_length", "max_target_length") if cfg.type == "seq2seq" else ("max_length",)
    for key in keys:
        if getattr(cfg, key) > limit:
            raise UserError(f"task.{key}={getattr(cfg, key)}: the model takes {limit} tokens; lower it")
