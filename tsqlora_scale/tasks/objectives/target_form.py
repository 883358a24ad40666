"""What is put around a target: where the decoder starts, which language it is told, where the text ends."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.objectives.languages import set_languages
from tsqlora_scale.tasks.objectives.tokenizing import TextEncoder


class TargetForm:
    """Targets as token ids, all of which end with an end token unless they are cut.

    A tokenizer that puts no end token behind a target gets one from us. Of a model of many languages the written
    language comes first: NLLB's, M2M100's and mBART-50's tokenizers put it before the target, so it is the first word
    that is learned (and forced in generation); those of mBART and PLBart put it behind, and it is where the decoder
    starts.
    """

    def __init__(self, cfg: TaskConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
        set_languages(cfg, tokenizer, model_config)
        self._encoder = TextEncoder(tokenizer)
        #: First input of the decoder.
        self.start = int(model_config.decoder_start_token_id)
        around = tokenizer(text_target=[""])["input_ids"][0]
        end = tokenizer.eos_token_id
        if end is None and around and around[-1] == tokenizer.sep_token_id:
            end = tokenizer.sep_token_id  # BERT's has no other end
        if end is None:
            raise UserError("task.type='seq2seq' needs a tokenizer with an end token (eos_token); this one has none")
        #: Token that ends a target.
        self.end = int(end)
        self._adds_end = end not in around
        self._language_is_last = cfg.target_lang is not None and around[-2:-1] == [end]
        if self._language_is_last:
            self.start = int(around[-1])
        self._forced = int(around[0]) if cfg.target_lang is not None and not self._language_is_last else None

    def rows(self, targets: list[str], limit: int) -> list[list[int]]:
        """Targets of at most ``limit`` tokens."""
        if self._language_is_last:
            return [row[:-1] for row in self._encoder.rows(targets, max_length=limit + 1, targets=True)["input_ids"]]
        if not self._adds_end:
            return self._encoder.rows(targets, max_length=limit, targets=True)["input_ids"]
        rows = self._encoder.rows(targets, max_length=limit + 1, targets=True)["input_ids"]
        return [[*row, self.end][:limit] for row in rows]

    def generation(self, own_ends: int | list[int] | None) -> dict[str, Any]:
        """What generation has to be told beside where it starts.

        Args:
            own_ends: tokens that end a text by the model's generation config.
        """
        options: dict[str, Any] = {}
        ends = {own_ends} if isinstance(own_ends, int) else {*(own_ends or [])}
        if self.end not in ends:
            options["eos_token_id"] = sorted({self.end, *ends})
        if self._forced is not None:
            options["forced_bos_token_id"] = self._forced
        return options
