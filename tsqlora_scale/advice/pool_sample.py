"""One look at a random part of the pool and at all of the query, by which everything is judged."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora_scale.audit.passes import StateLook
from tsqlora_scale.common.disk_arrays import positions
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.random_streams import philox, uniform
from tsqlora_scale.quality.draws.key_order import smallest
from tsqlora_scale.quality.features.forward_pass import ForwardPass
from tsqlora_scale.quality.features.hidden_states import with_states
from tsqlora_scale.quality.query.looks import FeatureLook, Shape
from tsqlora_scale.quality.query.model_copies import groups_to_a_model
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.tasks.batch import Batch
from tsqlora_scale.tasks.rows.mixed_sets import MixedSets


@dataclass(frozen=True)
class PoolSample:
    """What was seen. The same on every rank.

    Attributes:
        size: samples of the pool, the query's not counted.
        rows: of the pool that were looked at, (n,), ascending.
        query: rows of the query, at the pool's end, (m,).
        states: hidden states of some layers of the base, (n + m, width) float32.
        numbers: features and answers as a choice by the query takes them, (n + m, ...) float32.
        shape: of ``numbers``.
        copies: the number of every row's group of texts that are one to the model, (n + m,).
        weights: of the rows in even draws, (n + m,): each of the sample stands for as many as it was drawn from.
        seconds: of the look.
        sets: of a mixture, those of the rows (n + m,); None: there are none.
    """

    size: int
    rows: np.ndarray
    query: np.ndarray
    states: np.ndarray
    numbers: np.ndarray
    shape: Shape
    copies: np.ndarray
    weights: np.ndarray
    seconds: float
    sets: MixedSets | None = None

    @property
    def count(self) -> int:
        """n."""
        return len(self.rows)

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the pool was left out."""
        return self.count == self.size

    def without(self, out: np.ndarray) -> np.ndarray:
        """Which rows (n + m,) bool are neither the query's ``out`` (m,) nor copies of these; of the query, or of the
        pool, all others where there would be none."""
        known = ~np.isin(self.copies, self.copies[self.count :][out])
        if not known[self.count :].any():
            known[self.count :] = ~out
        if not known[: self.count].any():
            known[: self.count] = True
        return known

    def in_shares(self, weights: np.ndarray) -> np.ndarray:
        """Weights (n,) of the pool's rows, by which the sets of a mixture are drawn in their shares, as a run does
        whatever it chooses."""
        weights = np.array(weights, dtype=np.float64)
        if self.sets is not None:
            self.sets.balance(np.arange(self.count), weights)
        return weights

    @property
    def answers(self) -> np.ndarray:
        """Classes or numbers of all rows, (n + m,); losses of the base where answers are texts."""
        return self.shape.split(self.numbers)[1]


def look_at_sample(run: Run, count: int) -> PoolSample:
    """Look at ``count`` random rows of a run's pool, all if it has no more, and at its query. A collective.

    Raises:
        UserError: what the base makes of a sample is not finite, or does not fit in memory; on every rank.
    """
    task, world, seed = run.task, run.engine.world, run.config.run.seed
    size = len(task) - task.query_rows
    with world.together():
        rows = np.arange(size)
        if count < size:
            rows = positions(smallest(uniform(philox(seed, "advice rows"), size), count))
        weights = task.draw_weights()
    query = np.arange(size, len(task))
    both = np.concatenate([rows, query])
    see = _BothLooks(StateLook(seed), FeatureLook(task, seed=seed))
    start = time.perf_counter()
    with run.progress("looking at a part of the pool") as bar:
        scoring = run.config.scoring
        forward = ForwardPass(
            run.engine.module, world, batch_size=scoring.batch_size, max_length=scoring.max_length, progress=bar
        )
        seen = forward.run(task, both, see, name="advice")
    seconds = time.perf_counter() - start
    shapes = world.gather_objects((see.features.shape, see.width))
    shape, width = next((shape, width) for shape, width in shapes if shape is not None)
    with world.together():
        if not np.isfinite(seen).all():
            raise UserError(
                "the hidden states of the base are not finite, and advice rests on them; its weights are damaged, or "
                "it computes in too coarse a type: use model.dtype=fp32"
            )
        copies = groups_to_a_model(task.texts(both), seen[:, width:])
    own = np.ones(len(both)) if weights is None else np.asarray(weights[both], dtype=np.float64)
    own[: len(rows)] *= size / len(rows)
    sets = None if task.sets is None else replace(task.sets, numbers=np.asarray(task.sets.numbers[both]))
    return PoolSample(size, rows, query, seen[:, :width], seen[:, width:], shape, copies, own, seconds, sets)


class _BothLooks:
    """What an audit and what a choice by a query see of a batch, by one forward.

    Attributes:
        width: of what the audit sees.
    """

    def __init__(self, states: StateLook, features: FeatureLook) -> None:
        self.states, self.features, self.width = states, features, 0

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        """(B, width + L R d + 1) float32."""
        outputs = with_states(module, batch)
        again: Callable[..., Any] = lambda **_: outputs  # noqa: E731
        states = self.states.seen(outputs, batch).float()
        self.width = states.shape[1]
        return torch.cat([states, self.features(again, batch)], 1)  # type: ignore[arg-type]
