"""What the model learns from: data, and one objective over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tsqlora_scale.common.disk_arrays import blocks, counts, new_array
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.batch import Batch, class_logits, places_of
from tsqlora_scale.tasks.known_padding import known_padding, padding_of
from tsqlora_scale.tasks.losses import loss_terms, losses_at
from tsqlora_scale.tasks.metrics import METRICS, SampleLosses, compute_metrics, needs_answers, needs_losses
from tsqlora_scale.tasks.needed_logits import at_places, needed_logits, token_shift
from tsqlora_scale.tasks.objective_names import check_members, objective_class
from tsqlora_scale.tasks.objectives.chat import ChatObjective
from tsqlora_scale.tasks.objectives.label_heads import LabelObjective
from tsqlora_scale.tasks.objectives.objective import Measured, Objective, Rows
from tsqlora_scale.tasks.objectives.prompted import PromptedObjective
from tsqlora_scale.tasks.packing import Packer, known_samples
from tsqlora_scale.tasks.rows.column_checks import SAMPLE_ID
from tsqlora_scale.tasks.rows.data import Data
from tsqlora_scale.tasks.rows.mixed_sets import MixedSets
from tsqlora_scale.tasks.rows.rows_digest import rows_digest
from tsqlora_scale.tasks.rows.set_columns import DATA_SET, ROW_WEIGHT
from tsqlora_scale.tasks.rows.sources import SplitName
from tsqlora_scale.tasks.rows.text_sizes import text_lengths, text_sizes
from tsqlora_scale.tasks.rows.wanted import text_columns
from tsqlora_scale.tasks.split_pool import SplitPool
from tsqlora_scale.tasks.tokens.kept_tokens import KeptTokens

QUERY: SplitName = "query"
Indices = Sequence[int] | np.ndarray
#: rows of text that are in memory at once
ROWS = 2**16


class Task:
    """Rows in, batches and per-sample losses out; predictions in, metrics out. Holds no state that changes.

    Its training split is the :class:`~tsqlora_scale.quality.pool.Pool` that a selector chooses from, and what every
    method takes where no other split is named.

    Attributes:
        train: the pool, memory-mapped, with a ``sample_id`` column.
        dev: the held-out set, or the first of several, likewise, or None.
        tokenizer: the model's.
        packer: lays the pool's samples end to end; None: a row each.
    """

    packer: Packer | None = None

    def __init__(self, cfg: TaskConfig, data: Data, tokenizer: PreTrainedTokenizerBase, objective: Objective) -> None:
        self._cfg, self._objective = cfg, objective
        self._shift = token_shift(objective)
        self.tokenizer = tokenizer
        self.train, self.dev = data.pool(with_query=cfg.train_on_query), data.dev
        #: What need not be tokenized again.
        self.kept_tokens = KeptTokens(objective, fast=tokenizer.is_fast)
        #: Rows of the query at the end of the pool.
        self.query_rows = len(self.train) - len(data.train)
        #: The sets of ``task.mixture`` in the pool; None without one.
        self.sets = MixedSets.in_pool(cfg, self.train)
        self._data = {"train": self.train, QUERY: data.query}
        self._digests: dict[SplitName, str] = {}
        self._views: dict[SplitName, datasets.Dataset] = {"train": self.train.select_columns(objective.columns)}
        if data.query is not None:
            self._views[QUERY] = data.query.select_columns(objective.columns)
        if data.dev is not None:
            self._views["dev"] = data.dev.select_columns(objective.columns)
        for name, rows in data.more_dev.items():
            self._views[f"dev {name}"] = rows.select_columns(objective.columns)

    def __len__(self) -> int:
        """Samples of the pool."""
        return len(self.train)

    @property
    def sample_ids(self) -> Sequence[str]:
        """Names of the pool's samples, in order, read as they are asked for."""
        return self.train["sample_id"]  # type: ignore[no-any-return]

    @property
    def auto_class(self) -> Any:
        """The transformers auto class that loads the model."""
        return self._objective.auto_class

    @property
    def peft_task_type(self) -> str | None:
        """PEFT's name of the task type, if it has one."""
        return self._objective.peft_task_type

    @property
    def prompted(self) -> PromptedObjective | None:
        """The objective of a task with a prompt; None of others."""
        return self._objective if isinstance(self._objective, PromptedObjective) else None

    @property
    def held_out(self) -> dict[SplitName, str]:
        """What goes before the names of the metrics of every held-out set, the deciding one first: ``NAME/``."""
        names = list(self._cfg.dev_sets) if self.dev is not None else []
        splits = ["dev", *(f"dev {name}" for name in names[1:])]
        return dict(zip(splits, (f"{name}/" if name else "" for name in names), strict=False))

    @property
    def best_metric(self) -> str:
        """The metric that decides which checkpoint is best: the first of ``task.metrics`` on the first set."""
        return next(iter(self.held_out.values()), "") + self._cfg.metrics[0]

    @property
    def higher_is_better(self) -> bool:
        """Whether more of :attr:`best_metric` is better."""
        return METRICS[self._cfg.metrics[0]].higher_is_better

    def batch(self, rows: Indices, *, split: SplitName = "train", max_length: int | None = None) -> Batch:
        """Tokenise rows and pad them to the longest.

        Args:
            rows: B >= 1 rows of the split, in any order, repeats allowed.
            split: ``train``, ``dev``, or another of :attr:`held_out`.
            max_length: a limit in tokens in place of ``task.max_length``, if smaller.
        """
        limit = self._cfg.max_length if max_length is None else min(max_length, self._cfg.max_length)
        made = self.kept_tokens.padded(split, rows, limit)
        asks = split != "train" and isinstance(self._objective, ChatObjective)  # what the model may be asked for
        cells = self._rows(split, rows) if made is None or asks else {}
        inputs, targets = made or self._objective.collate(cells, limit)
        prompts = self._objective.prompts(cells) if asks and isinstance(self._objective, ChatObjective) else None
        places, words = None if self._shift is None else places_of(targets, self._shift), None
        if (prompted := self.prompted) is not None:
            places, words = prompted.slots(inputs), prompted.words
        padding = padding_of(inputs, looks_back=self._shift is not None)
        packing = self.packer.packed(inputs, places) if self.packer is not None and split == "train" else None
        return Batch(inputs, targets, np.array(rows, dtype=np.int64), prompts, places, padding, packing, words)

    def losses(self, module: Any, batch: Batch) -> Tensor:
        """Every sample's own mean loss, (B,) float32, with a graph: a forward of ``module`` on the batch."""
        sums, counts = self.loss_sums(self.outputs(module, batch), batch)
        return sums / counts

    def outputs(self, module: Any, batch: Batch, *, forward: Callable[..., Any] | None = None) -> Any:
        """A forward on the batch, for :meth:`loss_sums`: of a model of tokens the logits of those places alone that a
        loss is taken at, (1, n, V), where that spares much.

        Args:
            module: the model itself.
            forward: of an engine around it; none: the model's own.
        """
        if (packing := batch.packing) is not None:
            with known_samples(packing), needed_logits(module, packing.places, packing.shape):
                return (forward or module)(**packing.inputs)
        mask = batch.inputs.get("attention_mask")
        with (
            known_padding(batch.padding, None if mask is None else mask.shape),
            needed_logits(module, batch.places, batch.shape if batch.places is not None else None),
        ):
            return (forward or module)(**batch.inputs)

    def loss_sums(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed loss and number of loss terms of every sample, (B,) float32 each.

        The loss of sample i is their ratio: cross-entropy, squared error, or mean cross-entropy over its own
        target tokens (docs/method.md). Their sums over an optimizer step, divided, are the step's loss, however the
        step is cut into batches.
        """
        logits, places = self.needed(outputs, batch), batch.places
        if places is None or self._shift is None:
            return self._objective.losses(logits, batch.targets)
        return losses_at(logits, batch.targets, places, shift=self._shift)

    def needed(self, outputs: Any, batch: Batch) -> Tensor:
        """The logits that a loss is taken at: (n, V) at ``batch.places``, (B, C) of classes, or all that there are."""
        if batch.places is None or self._shift is None:
            return class_logits(outputs.logits, batch)
        return at_places(outputs.logits, batch)

    def loss_terms(self, batch: Batch) -> Tensor:
        """Number of loss terms of every sample (B,) float32, as :meth:`loss_sums` counts them, before any forward."""
        return loss_terms(batch.targets)

    @property
    def needs_answers(self) -> bool:
        """Whether ``task.metrics`` judge the model's answers, so that it has to be asked for them."""
        return needs_answers(self._cfg.metrics)

    @property
    def needs_losses(self) -> bool:
        """Whether ``task.metrics`` hold any that is taken of the samples' losses."""
        return needs_losses(self._cfg.metrics)

    def predict(self, module: Any, batch: Batch, *, synced: bool, outputs: Any = None) -> list[Any]:
        """The model's B answers, from the batch's inputs alone: class ids, numbers or generated texts.

        Args:
            module: the model itself (not an engine around it), in evaluation mode.
            batch: on the module's device.
            synced: parameters are sharded over ranks, so generation goes on until the last rank has finished.
                Every rank must then make the same number of calls.
            outputs: of ``module`` on this batch, where they are known: a class or a number needs no second forward.
        """
        if batch.words is not None and outputs is None:
            with torch.no_grad():
                outputs = self.outputs(module, batch)
        if outputs is not None and _answers_by_forward(self._objective):
            return self._objective.answers(class_logits(outputs.logits, batch))
        return self._objective.predict(module, batch, synced=synced)

    @property
    def answers_by_forward(self) -> bool:
        """Whether :meth:`predict` makes its answers of one forward's logits."""
        return _answers_by_forward(self._objective)

    @property
    def gives_probabilities(self) -> bool:
        """Whether :meth:`predict_in_full` gives probabilities of classes."""
        return self._cfg.type == "classification" and _answers_by_forward(self._objective)

    def predict_in_full(self, module: Any, batch: Batch, *, synced: bool) -> tuple[list[Any], np.ndarray | None]:
        """Answers as :meth:`predict` gives them, and the probability of every class, (B, C) float32.

        There are no probabilities of numbers and texts, nor where an objective of one's own has its own answers.
        """
        if not _answers_by_forward(self._objective):
            return self._objective.predict(module, batch, synced=synced), None
        with torch.no_grad():
            outputs = module(**batch.inputs) if batch.words is None else self.outputs(module, batch)
        logits = class_logits(outputs.logits, batch)
        found = self._objective.probabilities(logits)
        return self._objective.answers(logits), None if found is None else found.cpu().numpy()

    def references(self, rows: Indices, *, split: SplitName = "train") -> list[Any]:
        """The right answers of some rows: class ids, numbers or texts (whole, however short the targets are cut)."""
        cells = self._rows(split, rows)
        if isinstance(self._objective, ChatObjective):
            return list(self._objective.references(cells))
        return cells[self._objective.answer]

    def answer(self, row: int, *, split: SplitName = "train") -> str:
        """The right answer of a row, for tables: a class's name, a number, or the target text."""
        (answer,) = self.references([row], split=split)
        if self._cfg.type == "classification" and isinstance(self._cfg.labels, list):
            return self._cfg.labels[int(answer)]
        return " ".join(str(answer).split())

    def digest(self, split: SplitName = "train") -> str:
        """A digest of every row's text, answer and weight, in order. Taken once."""
        if split in self._digests:
            return self._digests[split]
        is_pool = split == "train"
        self._digests[split] = rows_digest(
            self._views[split], self.sets if is_pool else None, self.draw_weights() if is_pool else None
        )
        return self._digests[split]

    def metrics(
        self, predictions: list[Any], references: list[Any], losses: SampleLosses | None = None
    ) -> dict[str, float]:
        """``task.metrics`` of a split, as fractions (not times 100).

        Args:
            predictions: of all its rows; none where :attr:`needs_answers` is false.
            references: of the same.
            losses: of the same, where :attr:`needs_losses` is true.
        """
        cfg = self._cfg
        return compute_metrics(cfg.metrics, predictions, references, num_labels=cfg.num_labels, losses=losses)

    def lengths(self, split: SplitName = "train") -> np.ndarray:
        """Characters of input text of every row of a split, (N,) int32: enough to put rows of a length together."""
        names = [name for key, name in text_columns(self._cfg).items() if key != "task.target"]
        return text_lengths(self._views[split], names, ROWS)

    def sizes(self, rows: Indices) -> np.ndarray:
        """Characters of all texts of some rows of the pool, targets too, (B,) int64."""
        names = list(dict.fromkeys(text_columns(self._cfg).values()))
        return text_sizes(self.train, names, rows)

    def measured(self, rows: Indices) -> list[Measured]:
        """How long texts of the pool are in tokens, and how much of them is kept; nothing where the objective is a
        user's own and does not say."""
        measure = getattr(self._objective, "measured", None)
        return [] if measure is None else list(measure(self._rows("train", rows)))

    def strata(self) -> np.ndarray | None:
        """The class of every sample of the pool as numbers from 0 without gaps, (N,) int32, in a mixture with shares
        the pair of set and class; None without both."""
        labels = self.class_ids()
        if self.sets is not None and self.sets.shares is not None:
            labels = self.sets.within(labels)
        if labels is None:
            return None
        present = np.flatnonzero(counts(labels))
        for block in blocks(len(labels)):
            labels[block] = np.searchsorted(present, labels[block])
        return labels

    def class_ids(self, split: SplitName = "train") -> np.ndarray | None:
        """The class of every row of a split, (N,) int32; None without classes."""
        if self._cfg.type != "classification":
            return None
        answer = self._objective.answer
        view = self._views[split].select_columns([answer]).with_format("arrow")
        labels = new_array(len(view), np.int32)
        for block in blocks(len(view), ROWS):
            labels[block] = view[block][answer].to_numpy()
        return labels

    def draw_weights(self) -> np.ndarray | None:
        """What multiplies how often a sample is drawn, (N,) float64, above 0; None without weights and shares."""
        return self.row_weights() if self.sets is None else self.sets.draw_weights(self.train)

    def row_weights(self) -> np.ndarray | None:
        """What the data says of them: the same without shares, within a mixture the sets' own."""
        if (name := self._cfg.dataset.weight if self.sets is None else ROW_WEIGHT) not in self.train.column_names:
            return None
        view = self.train.select_columns([name]).with_format("arrow")
        weights = new_array(len(view), np.float64)
        for block in blocks(len(view), ROWS):
            weights[block] = view[block][name].to_numpy()
        return weights

    def texts(self, rows: Indices, *, split: SplitName = "train") -> list[tuple[str, ...]]:
        """Texts of rows as in the data: one or two, source and target, or a conversation and its last answer."""
        names = list(text_columns(self._cfg).values())
        if (key := f"texts of {split}") not in self._views:  # a selection goes through all of a large table
            self._views[key] = self._data[split].select_columns(names)
        cells = self._views[key][np.asarray(rows, dtype=np.int64).tolist()]
        if isinstance(self._objective, ChatObjective):
            return self._objective.texts(cells)
        return list(zip(*([text or "" for text in cells[name]] for name in names), strict=True))

    def given(self, block: slice) -> pa.Table:
        """The pool's samples of a block as they are in the data: its own id, the set of a mixture that they are of, the
        texts, and the answer (a class by its name)."""
        own_id = self._cfg.dataset.id_column
        names = [] if own_id in (None, SAMPLE_ID) else [own_id]
        names = list(dict.fromkeys([*names, *text_columns(self._cfg).values(), self._objective.answer]))
        table: pa.Table = self.train.select_columns(names).with_format("arrow")[block]
        place = names.index(self._objective.answer)
        if self._cfg.type == "classification" and isinstance(self._cfg.labels, list):
            classes = pa.array(self._cfg.labels).take(table.column(place).combine_chunks())
            table = table.set_column(place, names[place], classes)
        if self.sets is not None:
            sets = pa.array(self.sets.names).take(pa.array(self.sets.numbers[block]))
            table = table.add_column(0, DATA_SET, sets)
        return table

    def preview(self, row: int, *, split: SplitName = "train") -> str:
        """One sample's text on one line, for tables."""
        return " ".join(self._objective.preview(self._rows(split, [row]))[0].split())

    def rows_of(self, split: SplitName) -> datasets.Dataset:
        """The rows of a split with the columns of the data."""
        return self._data[split]

    def read_rows(self, split: SplitName) -> datasets.Dataset:
        """The rows of a split with the columns that are learned from."""
        return self._views[split]

    @property
    def query(self) -> SplitPool | None:
        """The rows of ``task.query``; None without them."""
        return SplitPool(self, QUERY) if QUERY in self._views else None

    def _rows(self, split: SplitName, indices: Indices) -> Rows:
        if split not in self._views:
            raise UserError("task.dataset.dev_file is not set, and evaluation needs it; name the file")
        return dict(self._views[split][np.asarray(indices, dtype=np.int64).tolist()])


def build_task(
    cfg: TaskConfig,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    model_config: PretrainedConfig,
    packer: Packer | None = None,
) -> Task:
    """The task over its data.

    Raises:
        UserError: the model cannot do the task; or an extension lacks what an objective sets when it is built.
    """
    objective = objective_class(cfg)(cfg, tokenizer, model_config)
    check_members(cfg, objective, ("columns", "answer"))
    task = Task(cfg, data, tokenizer, objective)
    task.packer = packer
    return task


def _answers_by_forward(objective: Objective) -> TypeGuard[LabelObjective]:
    """Whether the objective's answers are those of :class:`.LabelObjective`, which one forward's logits give."""
    return isinstance(objective, LabelObjective) and type(objective).predict is LabelObjective.predict
