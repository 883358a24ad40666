"""What is learned from plain text, without labels: masked tokens, corrupted spans, the next token.

Which tokens are hidden is drawn from the row's own number (``mask_stream``), so that it is the same on every rank and
in a resumed run. Shares are those of BERT (1810.04805) and T5 (1910.10683).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig, PreTrainedTokenizerBase

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.random_streams import philox
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.batch import IGNORED, Batch, pad_rows
from tsqlora_scale.tasks.objectives.causal import CausalObjective, check_decoder
from tsqlora_scale.tasks.objectives.model_inputs import InputRows
from tsqlora_scale.tasks.objectives.objective import MEASURED, Measured, Rows
from tsqlora_scale.tasks.objectives.seq2seq import Seq2SeqObjective
from tsqlora_scale.tasks.objectives.tokenizing import TextEncoder, pad_id
from tsqlora_scale.tasks.rows.corpus_rows import MASK_STREAM

#: The share of a text's tokens that is hidden.
HIDDEN = 0.15
#: Of those, the shares that become the mask token, and a random one; the rest stays as it is, and is learned too.
MASKED, RANDOM = 0.8, 0.1
#: Mean length of a hidden span.
SPAN = 3


class _OfText:
    """What objectives over one column of text share."""

    def __init__(self, cfg: TaskConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
        assert cfg.source is not None
        self._cfg, self._tokenizer = cfg, tokenizer
        self._encoder = TextEncoder(tokenizer)
        self._pad = pad_id(tokenizer)
        self._special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
        self.answer = cfg.source
        self.columns = [cfg.source, MASK_STREAM]

    def _encoded(self, rows: Rows, max_length: int) -> dict[str, list[list[int]]]:
        return self._encoder.rows(rows[self.answer], max_length=max_length)

    def preview(self, rows: Rows) -> list[str]:
        """The text."""
        return list(rows[self.answer])

    def measured(self, rows: Rows) -> list[Measured]:
        """Lengths of the texts."""
        around = self._tokenizer.num_special_tokens_to_add()
        lengths = [length + around for length in self._encoder.lengths(rows[self.answer], at_most=MEASURED)]
        return [Measured("text", lengths, self._cfg.max_length, self._encoder.lost_side)]


class MaskedText(_OfText):
    """Cross-entropy of hidden tokens, given the others on both sides (BERT's; 15 %, one at least)."""

    peft_task_type = "FEATURE_EXTRACTION"
    auto_class = AutoModelForMaskedLM
    losses = Seq2SeqObjective.losses

    def __init__(self, cfg: TaskConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
        super().__init__(cfg, tokenizer, model_config)
        if tokenizer.mask_token_id is None:
            raise UserError("pretrain.objective='mlm' needs a tokenizer with a mask token; use span or causal")
        self._mask = int(tokenizer.mask_token_id)
        self._inputs = InputRows(self.auto_class, tokenizer, model_config)
        known = model_config.get_text_config().vocab_size
        self._words = np.setdiff1d(np.arange(min(known, len(tokenizer))), self._special)

    def collate(self, rows: Rows, max_length: int) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs with hidden tokens, and these as targets, at their own places (B, T)."""
        encoded = self._encoded(rows, max_length)
        pairs = [self._hide(ids, stream) for ids, stream in zip(encoded["input_ids"], rows[MASK_STREAM], strict=True)]
        inputs = self._inputs.tensors({**encoded, "input_ids": [ids for ids, _ in pairs]})
        on_the_left = self._inputs.on_the_left
        return inputs, pad_rows([targets for _, targets in pairs], IGNORED, on_the_left=on_the_left)

    def _hide(self, ids: list[int], stream: int) -> tuple[list[int], list[int]]:
        row, generator = np.array(ids), philox(stream, "masked tokens")
        free = np.flatnonzero(~np.isin(row, self._special))
        if not len(free):
            return ids, [IGNORED] * len(ids)
        chosen = generator.choice(free, max(1, round(HIDDEN * len(free))), replace=False)
        targets = np.full(len(row), IGNORED)
        targets[chosen] = row[chosen]
        lots = generator.random(len(chosen))
        row[chosen[lots < MASKED]] = self._mask
        drawn = chosen[(lots >= MASKED) & (lots < MASKED + RANDOM)]
        row[drawn] = generator.choice(self._words, len(drawn))
        return row.tolist(), targets.tolist()

    def predict(self, module: Any, batch: Batch, *, synced: bool) -> list[Any]:
        """The likeliest tokens of the hidden places, as text. One forward."""
        with torch.no_grad():
            found = module(**batch.inputs).logits.argmax(dim=-1)
        hidden = batch.targets != IGNORED
        return [
            self._tokenizer.decode(row[places], clean_up_tokenization_spaces=False)
            for row, places in zip(found, hidden, strict=True)
        ]


class CorruptedText(Seq2SeqObjective):
    """What hidden spans were, given the rest of the text.

    Of tokenizers with sentinels (``<extra_id_0>``, T5's) the spans alone are written, each behind its sentinel; of
    those with a mask token (BART's) every span is one mask, and the whole text is written.
    """

    def __init__(self, cfg: TaskConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
        super().__init__(cfg, tokenizer, model_config)
        vocabulary = tokenizer.get_vocab()
        named = [vocabulary.get(f"<extra_id_{number}>") for number in range(100)]
        self._sentinels = [int(one) for one in named if one is not None]
        self._mask = tokenizer.mask_token_id
        if not self._sentinels and self._mask is None:
            raise UserError(
                "pretrain.objective='span' needs a tokenizer with sentinels (<extra_id_0>) or a mask token; use causal"
            )
        self._special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
        self.columns = [str(cfg.source), MASK_STREAM]

    def collate(self, rows: Rows, max_length: int) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs with ``decoder_input_ids`` (B, T'), and targets (B, T')."""
        encoded = self._encoder.rows(rows[self._source], max_length=max_length)
        pairs = [
            self._corrupt(ids, stream) for ids, stream in zip(encoded["input_ids"], rows[MASK_STREAM], strict=True)
        ]
        sources = [source for source, _ in pairs]
        written = [target for _, target in pairs]
        if not self._sentinels:  # of what is read, whatever the tokenizer puts around a target
            lengths = [len(ids) + (self._targets.end not in ids) for ids in encoded["input_ids"]]
            written = [
                self._targets.rows([text], length)[0] for text, length in zip(rows[self._source], lengths, strict=True)
            ]
        inputs = self._inputs.tensors({"input_ids": sources, "attention_mask": [[1] * len(ids) for ids in sources]})
        targets = [target[: self._cfg.max_target_length] for target in written]
        inputs["decoder_input_ids"] = pad_rows([[self._targets.start, *ids[:-1]] for ids in targets], self._pad)
        return inputs, pad_rows(targets, IGNORED)

    def _corrupt(self, ids: list[int], stream: int) -> tuple[list[int], list[int]]:
        """What is read, and the spans behind their marks."""
        free = np.flatnonzero(~np.isin(ids, self._special))
        noise = np.zeros(len(ids), dtype=bool)
        most = len(self._sentinels) or len(ids)
        noise[free] = hidden_spans(len(free), philox(stream, "hidden spans"), most=most)
        for one, following in pairwise(free.tolist()):  # what is special inside a span, an unknown token, goes with it
            if noise[one] and noise[following]:
                noise[one:following] = True
        source: list[int] = []
        target: list[int] = []
        spans = 0
        for place, token in enumerate(ids):
            begins = noise[place] and not (place and noise[place - 1])
            if begins:
                mark = self._sentinels[spans] if self._sentinels else int(self._mask)
                spans += 1
                source.append(mark)
                target.append(mark)
            if not noise[place]:
                source.append(token)
            if noise[place]:
                target.append(token)
        return source, [*target, self._targets.end]


class PlainText(_OfText):
    """Cross-entropy of every token given those before it, the end of the text among them."""

    peft_task_type = "CAUSAL_LM"
    auto_class = AutoModelForCausalLM
    losses = CausalObjective.losses

    def __init__(self, cfg: TaskConfig, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> None:
        super().__init__(cfg, tokenizer, model_config)
        check_decoder(tokenizer, model_config)
        self._end = tokenizer.eos_token_id

    def collate(self, rows: Rows, max_length: int) -> tuple[dict[str, Tensor], Tensor]:
        """The text and its end, padded on the right (B, T), and the same as targets, but for the first token: nothing
        before it says what it should be."""
        texts = []
        for ids in self._encoded(rows, max_length)["input_ids"]:
            adds_end = self._end is not None and (not ids or ids[-1] != self._end) and len(ids) < max_length
            texts.append([*ids, int(self._end)] if adds_end and self._end is not None else ids)
        inputs = {
            "input_ids": pad_rows(texts, self._pad),
            "attention_mask": pad_rows([[1] * len(ids) for ids in texts], 0),
        }
        return inputs, pad_rows([[IGNORED, *ids[1:]] for ids in texts], IGNORED)

    def predict(self, module: Any, batch: Batch, *, synced: bool) -> list[Any]:
        """The likeliest next token of every place, as text. One forward."""
        with torch.no_grad():
            found = module(**batch.inputs).logits.argmax(dim=-1)
        read = batch.inputs["attention_mask"].bool()
        return [
            self._tokenizer.decode(row[places], clean_up_tokenization_spaces=False)
            for row, places in zip(found, read, strict=True)
        ]


def hidden_spans(length: int, generator: np.random.Generator, *, most: int) -> np.ndarray:
    """Which of ``length`` tokens are hidden, bool: about 15 %, one at least, in spans of a mean of three (T5's).

    Spans and the stretches between them are random partitions; the first token is not hidden, where there are two.

    Args:
        most: spans.
    """
    hidden = np.zeros(length, dtype=bool)
    if length < 2:
        hidden[:] = True
        return hidden
    noise = min(max(round(HIDDEN * length), 1), length - 1)
    spans = min(max(round(noise / SPAN), 1), most, length - noise)
    inside, between = _partition(noise, spans, generator), _partition(length - noise, spans, generator)
    place = 0
    for gap, span in zip(between, inside, strict=True):
        hidden[place + gap : place + gap + span] = True
        place += gap + span
    return hidden


def _partition(total: int, parts: int, generator: np.random.Generator) -> list[int]:
    """``parts`` numbers of one or more that sum to ``total``, each way as likely."""
    cuts = np.sort(generator.choice(total - 1, parts - 1, replace=False)) + 1 if parts > 1 else np.array([], dtype=int)
    return [int(one) for one in np.diff(np.concatenate([[0], cuts, [total]]))]
