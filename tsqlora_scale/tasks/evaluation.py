"""Metrics and answers on a held-out set, sharded over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tsqlora_scale.engine.sharded import has_shards
from tsqlora_scale.tasks.metrics import SampleLosses

if TYPE_CHECKING:
    from torch import nn

    from tsqlora_scale.engine.collectives import World
    from tsqlora_scale.tasks import Batch, Task
    from tsqlora_scale.tasks.rows.sources import SplitName


@dataclass
class _Judged:
    """What one rank has found out about its rows, batch by batch."""

    rows: list[np.ndarray] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    #: Summed loss and number of loss terms of every row, (2, B) float32.
    losses: list[np.ndarray] = field(default_factory=list)


def evaluate(
    module: nn.Module,
    task: Task,
    world: World,
    *,
    batch_size: int,
    split: SplitName = "dev",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Metrics of ``module`` (unwrapped) on a split, the same on every rank and on any number of them. A collective.

    Nothing is generated where all metrics are taken of losses. Leaves the module in the mode that it was in.
    """
    with world.together():
        lengths = task.lengths(split)
    total, sharded = len(lengths), has_shards(module)
    judged = _Judged()
    order = np.argsort(lengths, kind="stable")
    with evaluating(module):
        for rows, batch in own_batches(task, world, order, batch_size=batch_size, split=split, progress=progress):
            outputs = task.outputs(module, batch) if task.needs_losses else None
            losses = None if outputs is None else torch.stack(task.loss_sums(outputs, batch)).cpu().numpy()
            if not task.answers_by_forward:
                outputs = None  # its logits of every position would be kept while texts are generated
            answers: list[Any] = []
            if task.needs_answers:
                answers = task.predict(module, batch, synced=sharded, outputs=outputs)
            if rows is not None:
                judged.rows.append(rows)
                judged.answers.extend(answers)
                judged.losses.extend([] if losses is None else [losses])
            outputs = None  # not beside those of the next batch
    return _metrics(task, world.gather_objects(judged), total, split)


def evaluate_all(
    module: nn.Module,
    task: Task,
    world: World,
    *,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """:func:`evaluate` on every held-out set; of several that have names, the metrics are ``NAME/METRIC``."""
    found: dict[str, float] = {}
    for split, prefix in task.held_out.items():
        metrics = evaluate(module, task, world, batch_size=batch_size, split=split, progress=progress)
        found |= {f"{prefix}{name}": value for name, value in metrics.items()}
    return found


def _metrics(task: Task, parts: list[_Judged], total: int, split: SplitName) -> dict[str, float]:
    """The metrics of what all ranks have found out, put into the order of the rows."""
    rows = np.concatenate([block for part in parts for block in part.rows])
    at = np.argsort(rows, kind="stable")  # position of every row among those of all ranks
    assert len(rows) == total, (len(rows), total)
    losses: SampleLosses | None = None
    if task.needs_losses:
        sums, terms = np.concatenate([block for part in parts for block in part.losses], axis=1)
        losses = SampleLosses(sums[at], terms[at])
    if not task.needs_answers:
        return task.metrics([], [], losses)
    answers = [answer for part in parts for answer in part.answers]
    return task.metrics([answers[i] for i in at], task.references(range(total), split=split), losses)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` is in evaluation mode and keeps no gradients; afterwards in the mode that it was in."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


def own_batches(
    task: Task,
    world: World,
    order: np.ndarray,
    *,
    batch_size: int,
    split: SplitName = "dev",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[np.ndarray | None, Batch]]:
    """This rank's batches of the rows ``order`` of a split, on its device, with the rows that they hold.

    What a batch holds does not depend on the number of ranks; ``order`` should put rows of a length together, so that
    little is computed on padding. Every rank gets as many batches, as ZeRO-3's gathers need; the rows of one that is
    there for that alone are None.
    """
    per_rank = math.ceil(math.ceil(len(order) / batch_size) / world.size)
    for number in range(per_rank):
        start = (number * world.size + world.rank) * batch_size
        rows = order[start : start + batch_size]
        yield (rows if len(rows) else None), task.batch(rows if len(rows) else order[:1], split=split).to(world.device)
        if progress is not None:
            progress(number + 1, per_rank)
