"""Metrics on the held-out set, sharded over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import nn

    from tsqlora_scale.engine.collectives import World
    from tsqlora_scale.tasks import Task


def evaluate(
    module: nn.Module,
    task: Task,
    world: World,
    *,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Metrics of ``module`` (unwrapped) on the development split, the same on every rank. A collective.

    Rows of a length go together, so that little is computed on padding. Every rank runs the same number of
    batches, as ZeRO-3's gathers need; rows repeated for that are dropped.
    Leaves the module in the mode that it was in.
    """
    assert task.dev is not None
    total = len(task.dev)
    with world.together():
        order = np.argsort(task.lengths("dev"), kind="stable")
    per_rank = math.ceil(math.ceil(total / batch_size) / world.size)
    was_training = module.training
    module.eval()
    rows: list[np.ndarray] = []
    predictions: list[object] = []
    with torch.no_grad():
        for number in range(per_rank):
            start = (number * world.size + world.rank) * batch_size
            indices = order[start : start + batch_size] if start < total else order[:1]
            predicted = task.predict(module, task.batch(indices, split="dev").to(world.device), synced=world.size > 1)
            if start < total:
                rows.append(indices)
                predictions.extend(predicted)
            if progress is not None:
                progress(number + 1, per_rank)
    module.train(was_training)
    mine = (np.concatenate(rows) if rows else np.empty(0, dtype=np.int64), predictions)
    everything = {int(i): p for ids, preds in world.gather_objects(mine) for i, p in zip(ids, preds, strict=True)}
    rows_in_order = range(total)
    return task.metrics([everything[i] for i in rows_in_order], task.references(rows_in_order, split="dev"))
