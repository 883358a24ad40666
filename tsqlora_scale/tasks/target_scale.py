"""Where the targets of a regression lie, and how far apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from tsqlora_scale.common.disk_arrays import blocks
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.task import ROWS, Task


@dataclass(frozen=True)
class TargetScale:
    """Of targets as they are drawn, in their own units.

    Attributes:
        column: that holds them.
        mean: of all.
        deviation: the standard deviation, above 0: 1 of targets that are all alike.
    """

    column: str
    mean: float
    deviation: float


def target_scale(task: Task, cfg: TaskConfig) -> TargetScale | None:
    """The scale of a regression's pool, its weights counted; None of other tasks."""
    if cfg.type != "regression":
        return None
    assert cfg.label is not None, "the config requires a label column"
    view = task.read_rows("train").select_columns([cfg.label]).with_format("arrow")
    weights = task.draw_weights()
    mean = _weighted_mean(view, cfg.label, weights, around=None)
    deviation = math.sqrt(_weighted_mean(view, cfg.label, weights, around=mean))
    return TargetScale(cfg.label, mean, deviation or 1.0)


def _weighted_mean(view: pa.Table, name: str, weights: np.ndarray | None, *, around: float | None) -> float:
    """Of a column, or of its squared distances from ``around``."""
    total = sum_of_weights = 0.0
    for block in blocks(len(view), ROWS):
        values = view[block][name].to_numpy().astype(np.float64)
        if around is not None:
            values = (values - around) ** 2
        weight = np.ones(len(values)) if weights is None else weights[block]
        total += float(weight @ values)
        sum_of_weights += float(weight.sum())
    return total / sum_of_weights
