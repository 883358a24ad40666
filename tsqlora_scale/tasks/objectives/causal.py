"""Causal models: instruction tuning, with the loss on the answer alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.batch import IGNORED, Batch, pad_rows
from tsqlora_scale.tasks.losses import token_losses
from tsqlora_scale.tasks.objectives.generation import generate_text
from tsqlora_scale.tasks.objectives.objective import MEASURED, Measured, Rows, Tokens
from tsqlora_scale.tasks.objectives.prompts import PromptFormat
from tsqlora_scale.tasks.objectives.tokenizing import pad_id


class CausalObjective:
    """Token cross-entropy of the answer given the prompt.

    ``max_length`` bounds prompt and answer together. Of it the answer has ``max_target_length`` tokens and the
    prompt the rest, whatever the two need: so no target is ever cut away by a long source, and the prompt that
    evaluation shows the model does not depend on the target, not even on its length. A long prompt loses the
    beginning of its input, and then of its source, a long answer its end. With a smaller ``max_length`` for one batch
    both shrink in proportion.
    """

    peft_task_type = "CAUSAL_LM"
    auto_class = AutoModelForCausalLM

    def __init__(self, cfg: TaskConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
        assert cfg.source is not None, "the config requires source and target columns"
        assert cfg.target is not None, "the config requires source and target columns"
        check_decoder(tokenizer, model_config)
        self._cfg, self._tokenizer = cfg, tokenizer
        self._format = PromptFormat(tokenizer, cfg.prefix, cfg.chat_date)
        self._pad = pad_id(tokenizer)
        self._source, self.answer = cfg.source, cfg.target
        self._input = cfg.input
        self.columns = list(dict.fromkeys(name for name in (cfg.source, cfg.input, cfg.target) if name is not None))
        self.token_columns = self.columns
        self._limits(cfg.max_length)

    def collate(self, rows: Rows, max_length: int) -> tuple[dict[str, Tensor], Tensor]:
        """Prompt and answer, padded on the right (B, T); targets (B, T) at the answers' own positions."""
        return self.padded(self.tokens(rows, max_length), rows)

    def tokens(self, rows: Rows, max_length: int) -> Tokens:
        """Prompt and answer of every row, and the prompt's length."""
        prompt_limit, answer_limit = self._limits(max_length)
        prompts = self._format.prompts(rows[self._source], prompt_limit, inputs=self._inputs(rows))
        answers = self._format.answers(rows[self.answer], answer_limit)
        both = zip(prompts, answers, strict=True)
        return {"input_ids": [[*p, *a] for p, a in both], "prompt": [[len(p)] for p in prompts]}

    def padded(self, tokens: Tokens, rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
        """What :meth:`collate` makes of rows with these tokens."""
        ids = tokens["input_ids"]
        inputs = {
            "input_ids": pad_rows(ids, self._pad),
            "attention_mask": pad_rows([[1] * len(row) for row in ids], 0),
        }
        begins = [begin for (begin,) in tokens["prompt"]]
        targets = [[IGNORED] * begin + row[begin:] for row, begin in zip(ids, begins, strict=True)]
        return inputs, pad_rows(targets, IGNORED)

    def losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One loss term for each answer token: logits at position t speak of the token at t + 1."""
        return token_losses(logits[:, :-1], targets[:, 1:])

    def predict(self, module: Any, batch: Batch, *, synced: bool) -> list[Any]:
        """Texts by beam search from the prompts alone."""
        ends = self._format.stop_ids
        return continued(module, self._tokenizer, self._cfg, self.prompts_only(batch), ends=ends, synced=synced)

    def prompts_only(self, batch: Batch) -> dict[str, Tensor]:
        """The batch's prompts (B, P), padded on the left, as generation needs them: every row ends with its prompt."""
        lengths = (batch.targets != IGNORED).int().argmax(dim=1)  # a prompt ends where the targets begin
        width = int(lengths.max())
        position = torch.arange(width, device=lengths.device) - (width - lengths)[:, None]
        inside = position >= 0
        ids = batch.inputs["input_ids"].gather(1, position.clamp(min=0))
        return {"input_ids": torch.where(inside, ids, self._pad), "attention_mask": inside.long()}

    def preview(self, rows: Rows) -> list[str]:
        """``source -> target``."""
        return [f"{s} -> {t}" for s, t in zip(self._sources(rows), rows[self.answer], strict=True)]

    def measured(self, rows: Rows) -> list[Measured]:
        """Lengths of prompt and answer."""
        prompt, answer = self._limits(self._cfg.max_length)
        sources, targets = ([text[:MEASURED] for text in cells] for cells in (self._sources(rows), rows[self.answer]))
        prompts = [len(row) for row in self._format.prompts(sources, MEASURED)]
        answers = [len(row) for row in self._format.answers(targets, MEASURED)]
        loses = "source's beginning" if self._input is None else "input's, else the source's beginning"
        return [
            Measured("prompt", prompts, prompt, loses),
            Measured("answer", answers, answer, "end"),
        ]

    def _sources(self, rows: Rows) -> list[str]:
        """The sources, behind each what ``task.input`` has for it."""
        sources: list[str] = rows[self._source]
        if self._input is None:
            return sources
        inputs = self._inputs(rows) or []
        return [s if text is None else self._format.joined(s, text) for s, text in zip(sources, inputs, strict=True)]

    def _inputs(self, rows: Rows) -> list[str | None] | None:
        """What is given behind every source; None where ``task.input`` names nothing."""
        if self._input is None:
            return None
        return [text if text and text.strip() else None for text in rows[self._input]]

    def _limits(self, max_length: int) -> tuple[int, int]:
        """Most tokens of (prompt, answer)."""
        answer = self._cfg.max_target_length
        if max_length < self._cfg.max_length:
            answer = max(1, answer * max_length // self._cfg.max_length)
        prompt = max_length - answer
        if prompt <= self._format.overhead:
            name = "task.max_length" if max_length == self._cfg.max_length else "a text's max_length"
            raise UserError(
                f"{name}={max_length} leaves {prompt} tokens for the prompt beside {answer} of task.max_target_length, "
                f"and prefix and template take {self._format.overhead}; raise it or lower task.max_target_length"
            )
        return prompt, answer


def check_decoder(tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
    """Check that a model writes on from what it has read, and that its tokenizer tells where tokens lie.

    Raises:
        UserError: it does not.
    """
    if model_config.is_encoder_decoder:
        raise UserError(
            f"task.type='causal' needs a decoder-only model, and model.name_or_path names a "
            f"{model_config.model_type!r} model, an encoder-decoder; use task.type: seq2seq"
        )
    if not tokenizer.is_fast:
        raise UserError("task.type='causal' needs a fast tokenizer (tokenizer.json); this model has a slow one only")


def continued(
    module: Any,
    tokenizer: PreTrainedTokenizerBase,
    cfg: TaskConfig,
    prompts: dict[str, Tensor],
    *,
    ends: list[int],
    synced: bool,
) -> list[str]:
    """What the model writes behind prompts (B, P), padded on the left, up to one of ``ends`` or of its own."""
    own = module.generation_config.eos_token_id
    stops = {*ends, *([own] if isinstance(own, int) else own or [])}
    return generate_text(
        module, tokenizer, prompts,
        prompt_length=prompts["input_ids"].shape[1],
        max_new_tokens=cfg.max_target_length, num_beams=cfg.num_beams, synced=synced,
        eos_token_id=sorted(stops), pad_token_id=pad_id(tokenizer),
    )  # fmt: skip
