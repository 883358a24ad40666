"""Where the targets of a regression lie, and how far apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tsqlora_scale.common.disk_arrays import blocks
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.task import ROWS, Task

#: Deviations of less, as a share of the mean, are rounding.
ALIKE = 1e-6


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


def target_scale(task: Task, cfg: TaskConfig) -> TargetScale:
    """The scale of a regression's pool, its weights counted.

    Raises:
        UserError: the disk of TMPDIR has no room for the weights.
    """
    assert cfg.label is not None, "the config requires a label column"
    view = task.read_rows("train").select_columns([cfg.label]).with_format("arrow")
    weights = task.draw_weights()
    middle: float | None = None
    total = first = second = 0.0
    for block in blocks(len(view), ROWS):
        values = view[block][cfg.label].to_numpy().astype(np.float64)
        middle = float(values.mean()) if middle is None else middle  # near the mean: squares lose no digits
        values -= middle
        weight = np.ones(len(values)) if weights is None else weights[block]
        total += float(weight.sum())
        first += float(weight @ values)
        second += float(weight @ values**2)
    assert middle is not None
    mean = middle + first / total
    deviation = math.sqrt(max(second / total - (first / total) ** 2, 0.0))
    return TargetScale(cfg.label, mean, deviation if deviation > ALIKE * abs(mean) else 1.0)
