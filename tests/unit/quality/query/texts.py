"""Pools of random texts with targets, and with a query."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.unit.quality.toys import RandomPool
from tsqlora_scale.tasks.batch import IGNORED, Batch

#: Words of the topic that the query is on.
TOPIC = 8


class Texts(RandomPool):
    """The pool as a task's: batches with targets; of a causal model answers behind prompts that give no loss."""

    def batch(self, indices: np.ndarray, *, max_length: int | None = None) -> Batch:
        made = super().batch(indices)
        targets = made.labels
        if self.generates and not self.seq2seq:
            for row, index in enumerate(indices):
                targets[row, : max(1, len(self.tokens[index]) - 2)] = IGNORED
        elif self.seq2seq:
            ids = targets.masked_fill(targets == IGNORED, 0)
            made.inputs["decoder_input_ids"] = torch.cat([torch.full((len(ids), 1), 2), ids[:, :-1]], 1)
        return Batch(made.inputs, targets, np.asarray(indices))

    def losses(self, module: Any, batch: Batch) -> Tensor:
        logits, targets = module(**batch.inputs).logits, batch.targets
        if not self.seq2seq:
            logits, targets = logits[:, :-1], targets[:, 1:]
        found = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
        return found.sum(1) / (targets != IGNORED).sum(1)


class Wanted(Texts):
    """A pool whose last samples are the query's, or that has it beside it.

    Args:
        every: one in so many rows has words of a topic alone, as the query's rows have, and a label by these; 0: all
            are alike, at random.
    """

    def __init__(
        self, kind: str, size: int, *, queried: int = 12, joins: bool = True, seed: int = 0, every: int = 0
    ) -> None:
        super().__init__(kind, size, seed)
        self.query: Wanted | None = None
        self.query_rows = 0
        for row in range(0, size, every) if every else ():
            self.tokens[row] = 5 + self.tokens[row] % TOPIC
            self.labels[row] = self.tokens[row].mean() > 5 + TOPIC / 2
        if queried:
            self.query = Wanted(kind, queried, queried=0, seed=seed + 1, every=min(every, 1))
        if queried and joins:
            assert self.query is not None
            self.query_rows = queried
            self.tokens, self.targets = self.tokens + self.query.tokens, self.targets + self.query.targets
            self.labels = np.concatenate([self.labels, self.query.labels])
            self.ids = [f"sample-{i}" for i in range(size + queried)]

    def class_ids(self) -> np.ndarray | None:
        return None if self.generates else self.labels


class Killed(Exception):
    """A kill in the middle of a pass."""
