"""Classification by a prompt: the classes' logits are those of their words at the template's slot.

Schick and Schuetze, *Exploiting Cloze Questions*, 2001.07676; Gao, Fisch and Chen, *Making Pre-trained Language Models
Better Few-shot Learners*, 2012.15723: no head is new, and the frozen base alone already answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.prompt_template import MASK, slot_of, words_by_class
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.batch import pad_rows
from tsqlora_scale.tasks.objectives.label_heads import LabelObjective
from tsqlora_scale.tasks.objectives.objective import MEASURED, Measured, Rows
from tsqlora_scale.tasks.objectives.prompt_text import PromptText
from tsqlora_scale.tasks.objectives.target_form import TargetForm
from tsqlora_scale.tasks.objectives.tokenizing import TextEncoder, pad_id

#: Tokens of a word that are looked at, to say which they are.
_LOOKED_AT = 8


class PromptedObjective(LabelObjective):
    """Cross-entropy over the classes' words at the slot, among these words alone.

    A word is one token, as it stands behind the template's text; one of several is told by its first where the model
    writes the answer, and refused where a single mask stands for it. While ``task.label_words`` is ``auto`` there are
    none, and neither are demonstrations, until :meth:`take_words`.

    Attributes:
        words: token ids of the classes' words, (C,) int64; None until they are known.
    """

    words: Tensor | None = None
    #: Whether a word of several tokens is told by its first.
    tells_by_first: ClassVar[bool] = True

    def __init__(self, cfg: TaskConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
        assert cfg.label is not None, "the config requires a label column"
        if not tokenizer.is_fast:
            raise UserError("task.prompt needs a fast tokenizer (tokenizer.json); this model has a slow one only")
        self._cfg, self._tokenizer, self._model_config = cfg, tokenizer, model_config
        self._regression = False
        self._encoder, self._pad = TextEncoder(tokenizer), pad_id(tokenizer)
        self._text = PromptText(cfg, tokenizer, slot=self._slot(), ids=self._ids)
        self.columns, self.answer = [*cfg.text, cfg.label], cfg.label
        if isinstance(cfg.label_words, str):
            self._text.demonstrate(["a"] * cfg.num_labels)  # see that there is room
            self._text = PromptText(cfg, tokenizer, slot=self._slot(), ids=self._ids)
            return
        assert cfg.label_words is not None, "the config requires label words"
        try:
            words = words_by_class(cfg.label_words, cfg.labels)
        except ValueError as error:  # of classes that the data alone names
            raise UserError(f"task: {error}") from None
        self.take_words(words)

    def take_words(self, words: Sequence[str]) -> None:
        """The classes' words, in the order of the classes.

        Raises:
            UserError: one is not a token of the tokenizer's, or two are told by the same.
        """
        ids = [self._known_word(word) for word in words]
        twice = next((i for i, number in enumerate(ids) if number in ids[:i]), None)
        if twice is not None:
            token = str(self._tokenizer.convert_ids_to_tokens(ids[twice]))
            raise UserError(
                f"task.label_words: {words[ids.index(ids[twice])]!r} and {words[twice]!r} are told by the same token "
                f"({token!r}); give each class a word of its own"
            )
        self.words = torch.tensor(ids)
        self._text.demonstrate([word.strip() for word in words])

    def collate(self, rows: Rows, max_length: int) -> tuple[dict[str, Tensor], Tensor]:
        """Prompts, padded on the right (B, T), and targets (B,) int64."""
        ids = self._text.rows(rows, max_length)
        inputs = {
            "input_ids": pad_rows(ids, self._pad),
            "attention_mask": pad_rows([[1] * len(row) for row in ids], 0),
        }
        return inputs, torch.tensor(rows[self.answer], dtype=torch.int64)

    def slots(self, inputs: dict[str, Tensor]) -> Tensor:
        """Where a batch's slots are, on the host: positions (B,) int64 in the flattened (B, T) of :attr:`.Batch.shape`,
        those whose logits speak of the word."""
        raise NotImplementedError

    def word_id(self, word: str) -> int | None:
        """The token of a word at the slot; None where it is none, or several."""
        ids = self._word_ids(word)
        return ids[0] if len(ids) == 1 and ids[0] != self._tokenizer.unk_token_id else None

    def word_of(self, token: int) -> str | None:
        """The word of letters that a token is at the slot; None where it is none, as a mark or a part of a word is."""
        word = str(self._tokenizer.decode([token])).strip()
        return word if word.isalpha() and self.word_id(word) == token else None

    def preview(self, rows: Rows) -> list[str]:
        """The prompts."""
        return self._text.texts(rows)

    def measured(self, rows: Rows) -> list[Measured]:
        """Lengths of prompts."""
        short: Rows = {name: [text[:MEASURED] for text in rows[name]] for name in self._cfg.text}
        lengths = [len(row) for row in self._ids(self._text.texts(short))]
        return [Measured("prompt", lengths, self._cfg.max_length, "texts' ends")]

    def _known_word(self, word: str) -> int:
        found = self.word_id(word)
        if found is not None:
            return found
        ids = self._word_ids(word)
        if not ids:
            raise UserError(
                f"task.label_words: at the slot the tokenizer makes no tokens of {word!r} alone, but joins it to "
                "task.prompt's text, or knows nothing of it; put a blank before the slot, or give another word"
            )
        if self._tokenizer.unk_token_id in ids:
            raise UserError(f"task.label_words: the tokenizer does not know {word!r}; give a word of its vocabulary")
        if not self.tells_by_first:
            parts = ", ".join(map(repr, self._tokenizer.convert_ids_to_tokens(ids)))
            raise UserError(
                f"task.label_words: {word!r} is {len(ids)} tokens at the slot ({parts}); give a word that is a single "
                "one"
            )
        if not str(self._tokenizer.decode([ids[0]])).strip():  # a blank alone says nothing of the word
            raise UserError(
                f"task.label_words: {word!r} begins with a blank that is a token of its own; end task.prompt without "
                "the blank before {answer}, or give another word"
            )
        return ids[0]

    def _word_ids(self, word: str) -> list[int]:
        """The tokens of a word behind what the template has in front of its slot; none where they are not its own."""
        lead = self._text.lead
        blank = " " if lead.endswith(" ") else ""
        before = lead.rstrip(" ") or ("a" if blank else "")
        alone, both = self._encoder.plain([before, before + blank + word.strip()])
        shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(alone, both, strict=False))))
        return both[shared:] if shared == len(alone) else []

    def _slot(self) -> str:
        """What stands at the slot."""
        return ""

    def _ids(self, prompts: list[str]) -> list[list[int]]:
        """Prompts as token ids, with what the tokenizer puts around texts."""
        ids: list[list[int]] = self._tokenizer(prompts, verbose=False)["input_ids"]
        return ids


class MaskedPrompt(PromptedObjective):
    """The word at a masked token, ``{mask}``."""

    peft_task_type = None  # PEFT has no name of it
    tells_by_first = False  # one mask is one token
    auto_class = AutoModelForMaskedLM

    def slots(self, inputs: dict[str, Tensor]) -> Tensor:
        """The places of the masks."""
        ids = inputs["input_ids"]
        at: Tensor = ids.eq(int(self._tokenizer.mask_token_id)).int().argmax(dim=1)
        return torch.arange(len(ids)) * ids.shape[1] + at

    def _slot(self) -> str:
        if self._tokenizer.mask_token is None:
            raise UserError("task.prompt has a slot {mask}, and the tokenizer has no mask_token; use {answer} instead")
        return str(self._tokenizer.mask_token)


class CausalPrompt(PromptedObjective):
    """The word that follows the prompt, ``{answer}``, in a decoder."""

    peft_task_type = "CAUSAL_LM"
    auto_class = AutoModelForCausalLM

    def slots(self, inputs: dict[str, Tensor]) -> Tensor:
        """The last tokens of the prompts."""
        mask = inputs["attention_mask"]
        return torch.arange(len(mask)) * mask.shape[1] + mask.sum(dim=1) - 1

    def _ids(self, prompts: list[str]) -> list[list[int]]:
        begin = self._tokenizer("")["input_ids"][:1]  # alone: the end token that some put behind is no place to go on
        begin = begin if begin == [self._tokenizer.bos_token_id] else []
        ids = self._tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
        return [[*begin, *row] for row in ids]


class Seq2SeqPrompt(PromptedObjective):
    """The first word that the decoder writes, ``{answer}``, of a prompt in the encoder."""

    peft_task_type = "SEQ_2_SEQ_LM"
    auto_class = AutoModelForSeq2SeqLM

    def __init__(self, cfg: TaskConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
        self._form = TargetForm(cfg, tokenizer, model_config)
        (self._empty,) = self._form.rows([""], _LOOKED_AT)
        (full,) = self._form.rows(["a"], _LOOKED_AT)
        first = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._empty, full, strict=False))
        #: What the decoder reads: its start, and what stands before the first word of a target.
        self._decoder = [self._form.start, *(number for number, _ in first)]
        super().__init__(cfg, tokenizer, model_config)

    def collate(self, rows: Rows, max_length: int) -> tuple[dict[str, Tensor], Tensor]:
        """Prompts, padded on the right (B, T), with ``decoder_input_ids`` (B, D), and targets (B,) int64."""
        inputs, targets = super().collate(rows, max_length)
        inputs["decoder_input_ids"] = torch.tensor([self._decoder]).repeat(len(targets), 1)
        return inputs, targets

    def slots(self, inputs: dict[str, Tensor]) -> Tensor:
        """The decoder's last positions."""
        rows, width = inputs["decoder_input_ids"].shape
        return torch.arange(1, rows + 1) * width - 1

    def _word_ids(self, word: str) -> list[int]:
        (row,) = self._form.rows([word.strip()], _LOOKED_AT)
        around = len(self._decoder) - 1
        end = len(self._empty) - around
        return row[around : len(row) - end]


#: ``task.prompt_base`` -> how it is asked
PROMPTED: dict[str, Any] = {"masked": MaskedPrompt, "causal": CausalPrompt, "seq2seq": Seq2SeqPrompt}


def prompted_class(cfg: TaskConfig) -> Any:
    """How a task with a prompt asks its base; where ``task.prompt_base`` is not known yet, by the slot alone."""
    assert cfg.prompt is not None
    return PROMPTED[cfg.prompt_base or ("masked" if slot_of(cfg.prompt) == MASK else "causal")]


def prompt_base(cfg: TaskConfig, model_config: PretrainedConfig) -> str | None:
    """``task.prompt_base`` of a task on a model, where the config leaves it open; None without a prompt."""
    if cfg.prompt is None or cfg.prompt_base is not None:
        return cfg.prompt_base
    if slot_of(cfg.prompt) == MASK:
        return "masked"
    return "seq2seq" if model_config.is_encoder_decoder else "causal"


def check_prompt_base(cfg: TaskConfig, model_config: PretrainedConfig) -> None:
    """See that a base is of the kind that its prompt's slot, and ``task.prompt_base``, take it for.

    Raises:
        UserError: it is not.
    """
    base, kind = cfg.prompt_base, f"model.name_or_path is a {model_config.model_type!r} model"
    fills_masks = type(model_config) in MODEL_FOR_MASKED_LM_MAPPING
    if base == "masked" and not fills_masks:
        raise UserError(
            f"task.prompt has a slot {{mask}}, and {kind}, which has no masked language model's head; put {{answer}} "
            "at the prompt's end instead"
        )
    if base == "causal" and model_config.is_encoder_decoder:
        raise UserError(
            f"task.prompt_base='causal', and {kind}, an encoder-decoder; set it to seq2seq, or leave it out"
        )
    if base == "causal" and fills_masks and not getattr(model_config, "is_decoder", False):
        raise UserError(
            f"task.prompt has a slot {{answer}}, and {kind}, which fills in masks and writes no text; use a slot "
            "{mask} instead"
        )
    start = getattr(model_config, "decoder_start_token_id", None)
    if base == "seq2seq" and (not model_config.is_encoder_decoder or start is None):
        raise UserError(
            f"task.prompt_base='seq2seq', and {kind}, no encoder-decoder with a decoder_start_token_id; leave it out"
        )
