"""What another program's generation has to be told so that answers begin and end as they were learned."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.objectives.conversation_tokens import ConversationTokens
from tsqlora_scale.tasks.objectives.prompts import PromptFormat
from tsqlora_scale.tasks.objectives.target_form import TargetForm


def answer_settings(
    cfg: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
    model_config: PretrainedConfig,
    own_ends: int | list[int] | None,
) -> dict[str, Any]:
    """Generation settings that evaluation adds to the model's own: more tokens that end an answer (a chat template's
    closing mark), where the decoder starts, and a first token that is forced (a language's).

    Args:
        own_ends: ``eos_token_id`` of the model's own settings.

    Returns:
        What differs from these; nothing of tasks that write no texts, and of an objective of one's own.
    """
    if cfg.objective is not None or cfg.type not in ("causal", "seq2seq"):
        return {}
    if cfg.type == "seq2seq":
        form = TargetForm(cfg, tokenizer, model_config)
        start = {} if form.start == model_config.decoder_start_token_id else {"decoder_start_token_id": form.start}
        return form.generation(own_ends) | start
    spoken = cfg.messages is not None
    told = ConversationTokens(tokenizer, cfg) if spoken else PromptFormat(tokenizer, cfg.prefix, cfg.chat_date)
    own = {own_ends} if isinstance(own_ends, int) else {*(own_ends or [])}
    return {} if own >= {*told.stop_ids} else {"eos_token_id": sorted({*told.stop_ids, *own})}
