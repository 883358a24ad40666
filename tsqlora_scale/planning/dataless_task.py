"""A task without data: batches as long as its limits allow, and losses of them as a run takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.batch import Batch
from tsqlora_scale.tasks.needed_logits import token_shift
from tsqlora_scale.tasks.objective_names import objective_class
from tsqlora_scale.tasks.objectives.prompted import PromptedObjective, Seq2SeqPrompt
from tsqlora_scale.tasks.task import Task


class DatalessTask(Task):
    """A task of which only :meth:`~.Task.outputs`, :meth:`~.Task.loss_sums` and :meth:`~.Task.losses` are there.

    Its objective has no tokenizer, and has not been initialised: those of this package take losses without either.

    Attributes:
        longest: tokens of a row at its longest.
        decoder: tokens that a decoder reads beside them; 0 without one.
        targets: tokens of a row that a loss is taken at, 1 for a label.
    """

    def __init__(self, cfg: TaskConfig) -> None:
        kind = objective_class(cfg)
        objective: Any = kind.__new__(kind)
        objective._regression = cfg.type == "regression"
        self._cfg, self._objective = cfg, objective
        self._shift = token_shift(self._objective)
        self.longest, self.decoder, self.targets = cfg.max_length, 0, 1
        if cfg.type == "seq2seq":
            self.decoder = self.targets = cfg.max_target_length
        elif cfg.type == "causal":
            self.targets = self.longest - 1 if cfg.messages is not None else min(cfg.max_target_length, self.longest)

    def full_batch(self, rows: int, *, max_length: int | None = None) -> Batch:
        """Rows of the greatest length, of tensors of the mode that is on; one of several is taken to be padded.

        Args:
            max_length: in the place of ``task.max_length``, if smaller.
        """
        longest = min(self.longest, max_length or self.longest)
        ids = torch.zeros(rows, longest, dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if isinstance(self._objective, PromptedObjective):
            if isinstance(self._objective, Seq2SeqPrompt):
                inputs["decoder_input_ids"] = torch.zeros(rows, 1, dtype=torch.int64)
            places, words = torch.zeros(rows, dtype=torch.int64), torch.zeros(self._cfg.num_labels, dtype=torch.int64)
            targets = torch.zeros(rows, dtype=torch.int64)
            return Batch(inputs, targets, np.arange(rows), places=places, padding="some", words=words)
        if self._cfg.type not in ("causal", "seq2seq"):
            kind = torch.float32 if self._cfg.type == "regression" else torch.int64
            return Batch(inputs, torch.zeros(rows, dtype=kind), np.arange(rows), padding="some")
        if self._cfg.type == "seq2seq":
            inputs["decoder_input_ids"] = torch.zeros(rows, self.decoder, dtype=torch.int64)
        targets = torch.zeros_like(inputs.get("decoder_input_ids", ids))
        places = torch.zeros(rows * min(self.targets, targets.shape[1]), dtype=torch.int64)
        looks_back: Any = "source" if self.decoder else "after"
        known = self._shift is not None
        return Batch(inputs, targets, np.arange(rows), None, places if known else None, looks_back if known else "some")
