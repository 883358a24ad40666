"""Classification and regression: one or two texts in, one class or number out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedTokenizerBase

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.batch import Batch, class_logits
from tsqlora_scale.tasks.losses import class_losses, squared_losses
from tsqlora_scale.tasks.objectives.model_inputs import InputRows
from tsqlora_scale.tasks.objectives.objective import MEASURED, Measured, Rows, Tokens
from tsqlora_scale.tasks.objectives.tokenizing import TextEncoder


class LabelObjective:
    """Cross-entropy over classes, or squared error of one number.

    Texts longer than ``max_length`` lose their ends (or beginnings, by the tokenizer's ``truncation_side``); of a pair,
    the longer text loses first.
    """

    peft_task_type: str | None = "SEQ_CLS"
    auto_class: Any = AutoModelForSequenceClassification

    def __init__(self, cfg: TaskConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
        assert cfg.label is not None, "the config requires a label column"
        check_forward_is_told_enough(model_config)
        self._cfg, self._tokenizer, self._model_config = cfg, tokenizer, model_config
        self._encoder = TextEncoder(tokenizer)
        self._inputs = InputRows(self.auto_class, tokenizer, model_config)
        self._regression = cfg.type == "regression"
        self.columns = [*cfg.text, cfg.label]
        self.token_columns = list(cfg.text)
        self.answer = cfg.label

    def collate(self, rows: Rows, max_length: int) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs (B, T) and targets (B,): int64 class ids or float32 numbers."""
        return self.padded(self.tokens(rows, max_length), rows)

    def tokens(self, rows: Rows, max_length: int) -> Tokens:
        """What the tokenizer makes of the texts."""
        return self._encoder.rows(*(rows[name] for name in self._cfg.text), max_length=max_length)

    def padded(self, tokens: Tokens, rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
        """What :meth:`collate` makes of rows with these tokens: their answers are those of the rows."""
        inputs = self._inputs.tensors(tokens)
        return inputs, torch.tensor(rows[self.answer], dtype=torch.float32 if self._regression else torch.int64)

    def losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One loss term for each sample."""
        return squared_losses(logits, targets) if self._regression else class_losses(logits, targets)

    def predict(self, module: Any, batch: Batch, *, synced: bool) -> list[Any]:
        """The likeliest class ids, or the numbers. One forward: ranks need no further synchronising."""
        with torch.no_grad():
            return self.answers(class_logits(module(**batch.inputs).logits, batch))

    def answers(self, logits: Tensor) -> list[Any]:
        """What :meth:`predict` makes of a forward's logits (B, C)."""
        logits = logits.float()
        answers: list[Any] = (logits.squeeze(-1) if self._regression else logits.argmax(dim=-1)).tolist()
        return answers

    def probabilities(self, logits: Tensor) -> Tensor | None:
        """Of every class, (B, C) float32 with rows that sum to 1; None for a number."""
        return None if self._regression else logits.float().softmax(dim=-1)

    def preview(self, rows: Rows) -> list[str]:
        """The text, or both with a bar between them."""
        return [" | ".join(texts) for texts in zip(*(rows[name] for name in self._cfg.text), strict=True)]

    def measured(self, rows: Rows) -> list[Measured]:
        """Lengths of the text, or of both together."""
        columns = [self._encoder.lengths(rows[name], at_most=MEASURED) for name in self._cfg.text]
        around = self._tokenizer.num_special_tokens_to_add(pair=len(columns) > 1)
        what, lengths = " + ".join(self._cfg.text), [sum(row) + around for row in zip(*columns, strict=True)]
        return [Measured(what, lengths, self._cfg.max_length, self._encoder.lost_side)]


def check_forward_is_told_enough(model_config: PretrainedConfig) -> None:
    """See that a model's config says what its forward has to know beside the texts.

    Raises:
        UserError: an encoder-decoder does not know its first token, or X-MOD the language of the texts.
    """
    if model_config.is_encoder_decoder and getattr(model_config, "decoder_start_token_id", None) is None:
        raise UserError(
            f"model.name_or_path is a {model_config.model_type!r} model whose config.json has no "
            "decoder_start_token_id, with which its decoder begins; write it there (T5's is the padding token's number)"
        )
    if model_config.model_type == "xmod" and model_config.default_language is None:
        raise UserError(
            "model.name_or_path is an 'xmod' model, which has parts for every language, and the default_language of "
            f"its config.json is null; write one of {', '.join(model_config.languages)} there"
        )
