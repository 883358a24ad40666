"""Encoder-decoder models: a source text in, a target text out (summaries, translations)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedTokenizerBase

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.batch import IGNORED, Batch, pad_rows
from tsqlora_scale.tasks.losses import token_losses
from tsqlora_scale.tasks.objectives.generation import generate_text
from tsqlora_scale.tasks.objectives.model_inputs import InputRows
from tsqlora_scale.tasks.objectives.objective import MEASURED, Measured, Rows, Tokens
from tsqlora_scale.tasks.objectives.target_form import TargetForm
from tsqlora_scale.tasks.objectives.tokenizing import TextEncoder, pad_id


class Seq2SeqObjective:
    """Token cross-entropy of the target given the source.

    Sources longer than ``max_length`` and targets longer than ``max_target_length`` lose their ends, but keep
    the special tokens that the tokenizer puts there. The decoder's input is the target shifted right by one.
    """

    peft_task_type = "SEQ_2_SEQ_LM"
    auto_class = AutoModelForSeq2SeqLM

    def __init__(self, cfg: TaskConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
        assert cfg.source is not None, "the config requires source and target columns"
        assert cfg.target is not None, "the config requires source and target columns"
        start = getattr(model_config, "decoder_start_token_id", None)
        if not model_config.is_encoder_decoder or start is None:
            raise UserError(
                f"task.type='seq2seq' needs an encoder-decoder with a decoder_start_token_id, and model.name_or_path "
                f"is a {model_config.model_type!r} model without; use a model such as T5 or BART, or task.type: causal"
            )
        self._cfg, self._tokenizer = cfg, tokenizer
        self._targets = TargetForm(cfg, tokenizer, model_config)
        self._encoder = TextEncoder(tokenizer)
        self._inputs = InputRows(self.auto_class, tokenizer, model_config)
        self._pad = pad_id(tokenizer)
        self.columns = self.token_columns = [cfg.source, cfg.target]
        self._source, self.answer = cfg.source, cfg.target

    def collate(self, rows: Rows, max_length: int) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs with ``decoder_input_ids`` (B, T), and targets (B, T)."""
        return self.padded(self.tokens(rows, max_length), rows)

    def tokens(self, rows: Rows, max_length: int) -> Tokens:
        """What the tokenizer makes of the sources, and the targets' tokens."""
        sources = [self._cfg.prefix + text for text in rows[self._source]]
        targets = self._targets.rows(rows[self.answer], self._cfg.max_target_length)
        return {**self._encoder.rows(sources, max_length=max_length), "targets": targets}

    def padded(self, tokens: Tokens, rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
        """What :meth:`collate` makes of rows with these tokens."""
        targets = tokens["targets"]
        inputs = self._inputs.tensors({name: tokens[name] for name in tokens if name != "targets"})
        inputs["decoder_input_ids"] = pad_rows([[self._targets.start, *ids[:-1]] for ids in targets], self._pad)
        return inputs, pad_rows(targets, IGNORED)

    def losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One loss term for each target token; logits and targets are aligned by the shifted decoder input."""
        return token_losses(logits, targets)

    def predict(self, module: Any, batch: Batch, *, synced: bool) -> list[Any]:
        """Texts by beam search from the source alone."""
        inputs = {name: tensor for name, tensor in batch.inputs.items() if name != "decoder_input_ids"}
        return generate_text(
            module, self._tokenizer, inputs,
            prompt_length=1,  # the start token
            max_new_tokens=self._cfg.max_target_length, num_beams=self._cfg.num_beams, synced=synced,
            decoder_start_token_id=self._targets.start, pad_token_id=self._pad,
            **self._targets.generation(module.generation_config.eos_token_id),
        )  # fmt: skip

    def preview(self, rows: Rows) -> list[str]:
        """``source -> target``."""
        return [f"{s} -> {t}" for s, t in zip(rows[self._source], rows[self.answer], strict=True)]

    def measured(self, rows: Rows) -> list[Measured]:
        """Lengths of source and target."""
        around = self._tokenizer.num_special_tokens_to_add()
        sources = self._encoder.lengths([self._cfg.prefix + text for text in rows[self._source]], at_most=MEASURED)
        targets = self._encoder.lengths(rows[self.answer], at_most=MEASURED)
        limits, side = (self._cfg.max_length, self._cfg.max_target_length), self._encoder.lost_side
        return [
            Measured(what, [length + around for length in lengths], limit, side)
            for what, lengths, limit in zip(("source", "target"), (sources, targets), limits, strict=True)
        ]
