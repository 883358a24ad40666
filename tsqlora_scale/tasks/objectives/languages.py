"""Languages of models that translate between many: mBART, NLLB, M2M100, PLBart."""

from __future__ import annotations

import difflib
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig


def known_languages(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Languages that a tokenizer can be told of; none where it has no such setting."""
    if not hasattr(tokenizer, "src_lang") or not hasattr(tokenizer, "set_tgt_lang_special_tokens"):
        return []
    for name in ("lang_code_to_token", "lang_code_to_id"):  # M2M100's names are not its tokens
        if codes := getattr(tokenizer, name, None):
            return sorted(codes)
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token, tokenizer.mask_token}
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(special - named - {tokenizer.cls_token, tokenizer.sep_token})


def set_languages(cfg: TaskConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
    """Tell the tokenizer which language is read, and which is written.

    Raises:
        UserError: naming the key: a language is missing or unknown, or the model knows none.
    """
    known = known_languages(tokenizer)
    for key, language in (("source_lang", cfg.source_lang), ("target_lang", cfg.target_lang)):
        if language is None and known:
            raise UserError(
                f"task.{key} is not set, and model.name_or_path is a {model_config.model_type!r} model of many "
                f"languages; name one of {_some(known)}"
            )
        if language is not None and not known:
            raise UserError(
                f"task.{key}={language!r}: the tokenizer of this {model_config.model_type!r} model is not told "
                "languages; remove it"
            )
        if language is not None and language not in known:
            near = difflib.get_close_matches(language.lower(), [name.lower() for name in known], 3, 0.4)
            nearest = [name for name in known if name.lower() in near or name.lower().startswith(language.lower()[:2])]
            hint = f"did you mean {' or '.join(map(repr, nearest[:4]))}? " if nearest else ""
            raise UserError(f"task.{key}={language!r}: no language of this model; {hint}It has {_some(known)}")
    if known:
        settings: Any = tokenizer
        settings.tgt_lang, settings.src_lang = cfg.target_lang, cfg.source_lang


def _some(known: list[str]) -> str:
    shown = ", ".join(known[:12])
    return shown if len(known) <= 12 else f"{shown}, … ({len(known)} in all)"
