"""What the model learns from: data, and one objective over it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tsqlora_scale.common.disk_arrays import allocate, blocks, counts
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.batch import Batch
from tsqlora_scale.tasks.losses import loss_terms
from tsqlora_scale.tasks.metrics import METRICS, compute_metrics
from tsqlora_scale.tasks.objectives.causal import CausalObjective
from tsqlora_scale.tasks.objectives.label_heads import LabelObjective
from tsqlora_scale.tasks.objectives.objective import Objective, Rows
from tsqlora_scale.tasks.objectives.seq2seq import Seq2SeqObjective
from tsqlora_scale.tasks.objectives.tokenizing import check_lengths
from tsqlora_scale.tasks.rows.data import Data, text_columns
from tsqlora_scale.tasks.rows.sources import SplitName

Indices = Sequence[int] | np.ndarray
#: rows of text that are in memory at once
ROWS = 2**16


class Task:
    """Rows in, batches and per-sample losses out; predictions in, metrics out. Holds no state that changes.

    Attributes:
        train: the pool, memory-mapped, with a ``sample_id`` column.
        dev: the held-out set, likewise, or None.
        tokenizer: the model's.
    """

    def __init__(self, cfg: TaskConfig, data: Data, tokenizer: PreTrainedTokenizerBase, objective: Objective) -> None:
        self._cfg, self._objective = cfg, objective
        self.tokenizer = tokenizer
        self.train, self.dev = data.train, data.dev
        self._digests: dict[SplitName, str] = {}
        self._views: dict[SplitName, datasets.Dataset] = {"train": data.train.select_columns(objective.columns)}
        if data.dev is not None:
            self._views["dev"] = data.dev.select_columns(objective.columns)

    @property
    def auto_class(self) -> Any:
        """The transformers auto class that loads the model."""
        return self._objective.auto_class

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` that the task decides: size and kind of the head, class names."""
        return self._objective.model_kwargs

    @property
    def peft_task_type(self) -> str:
        """PEFT's name of the task type."""
        return self._objective.peft_task_type

    @property
    def best_metric(self) -> str:
        """The metric that decides which checkpoint is best: the first of ``task.metrics``."""
        return self._cfg.metrics[0]

    @property
    def higher_is_better(self) -> bool:
        """Whether more of :attr:`best_metric` is better."""
        return METRICS[self.best_metric].higher_is_better

    def batch(self, split: SplitName, indices: Indices, *, max_length: int | None = None) -> Batch:
        """Tokenise rows and pad them to the longest.

        Args:
            split: ``train`` or ``dev``.
            indices: B >= 1 rows of the split, in any order, repeats allowed.
            max_length: a limit in tokens in place of ``task.max_length``, if smaller.
        """
        limit = self._cfg.max_length if max_length is None else min(max_length, self._cfg.max_length)
        inputs, targets = self._objective.collate(self._rows(split, indices), limit)
        return Batch(inputs, targets, np.array(indices, dtype=np.int64))

    def losses(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed loss and number of loss terms of every sample, (B,) float32 each.

        The loss of sample i is their ratio: cross-entropy, squared error, or mean cross-entropy over its own
        target tokens (METHOD 0). Their sums over an optimizer step, divided, are the step's loss, however the
        step is cut into batches.
        """
        return self._objective.losses(outputs.logits, batch.targets)

    def loss_terms(self, batch: Batch) -> Tensor:
        """Number of loss terms of every sample (B,) float32, as :meth:`losses` counts them, before any forward."""
        return loss_terms(batch.targets)

    def predict(self, module: Any, batch: Batch, *, synced: bool) -> list[Any]:
        """The model's B answers, from the batch's inputs alone: class ids, numbers or generated texts.

        Args:
            module: the model itself (not an engine around it), in evaluation mode.
            batch: on the module's device.
            synced: parameters are sharded over ranks, so generation goes on until the last rank has finished.
                Every rank must then make the same number of calls.
        """
        return self._objective.predict(module, batch, synced=synced)

    def references(self, split: SplitName, indices: Indices) -> list[Any]:
        """The right answers of some rows: class ids, numbers or texts (whole, however short the targets are cut)."""
        return self._rows(split, indices)[self._objective.answer]

    def answer(self, split: SplitName, index: int) -> str:
        """The right answer of a row, for tables: a class's name, a number, or the target text."""
        (answer,) = self.references(split, [index])
        if isinstance(self._cfg.labels, list):
            return self._cfg.labels[int(answer)]
        return " ".join(str(answer).split())

    def digest(self, split: SplitName) -> str:
        """A digest of every row's text and answer, in order. Taken once."""
        if split in self._digests:
            return self._digests[split]
        digest = hashlib.sha256()
        view = self._views[split]
        for rows in view.iter(batch_size=10_000):
            for name in view.column_names:
                digest.update(repr(rows[name]).encode())
        self._digests[split] = digest.hexdigest()
        return self._digests[split]

    def metrics(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        """``task.metrics`` of all predictions of a split, as fractions (not times 100)."""
        return compute_metrics(self._cfg.metrics, predictions, references, num_labels=self._cfg.num_labels)

    def lengths(self, split: SplitName) -> np.ndarray:
        """Characters of input text of every row of a split, (N,) int32: enough to put rows of a length together."""
        names = [name for key, name in text_columns(self._cfg).items() if key != "task.target"]
        view = self._views[split].select_columns(names).with_format("arrow")
        lengths = allocate(len(view), np.int32)
        for block in blocks(len(view), ROWS):
            table = view[block]
            lengths[block] = np.stack([pc.utf8_length(table[name]).to_numpy() for name in names]).sum(axis=0)
        return lengths

    def strata(self, split: SplitName) -> np.ndarray:
        """The class of every row of a split as numbers from 0 without gaps, (N,) int32; classification only."""
        assert self._cfg.type == "classification", self._cfg.type
        answer = self._objective.answer
        view = self._views[split].select_columns([answer]).with_format("arrow")
        labels = allocate(len(view), np.int32)
        for block in blocks(len(view), ROWS):
            labels[block] = view[block][answer].to_numpy()
        present = np.flatnonzero(counts(labels))
        for block in blocks(len(labels)):
            labels[block] = np.searchsorted(present, labels[block])
        return labels

    def preview(self, split: SplitName, index: int) -> str:
        """One sample's text on one line, for tables."""
        (text,) = self._objective.preview(self._rows(split, [index]))
        return " ".join(text.split())

    def _rows(self, split: SplitName, indices: Indices) -> Rows:
        if split not in self._views:
            raise UserError("task.dataset.dev_file is not set, and evaluation needs it; name the file")
        rows: Rows = self._views[split][np.asarray(indices, dtype=np.int64).tolist()]
        return rows


def build_task(cfg: TaskConfig, data: Data, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig) -> Task:
    """The task over its data.

    Raises:
        UserError: the model cannot do the task, or takes fewer tokens than its lengths say.
    """
    objective = objective_class(cfg.type)(cfg, tokenizer, model_config)
    check_lengths(cfg, tokenizer, model_config)
    return Task(cfg, data, tokenizer, objective)


def objective_class(task_type: str) -> Any:
    """The implementation of :class:`Objective` for a task type."""
    return {"seq2seq": Seq2SeqObjective, "causal": CausalObjective}.get(task_type, LabelObjective)


def auto_class_of(task_type: str) -> Any:
    """The transformers auto class that loads models for a task type."""
    return objective_class(task_type).auto_class
