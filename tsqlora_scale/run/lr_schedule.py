"""The learning rate of a step: a pure function, so that nothing of it is lost at a rebuild or a resume."""

from __future__ import annotations

import math

from tsqlora_scale.config.fields import as_steps
from tsqlora_scale.config.schema import TrainConfig


def learning_rate(train: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (counted from 0) of ``total_steps``.

    Linear warm-up over ``lr_warmup`` steps, then constant, or linear or cosine decay to zero at the end.
    """
    warmup = as_steps(train.lr_warmup, total_steps)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    if train.lr_schedule == "constant":
        return train.lr
    progress = (step - warmup) / max(1, total_steps - warmup)
    if train.lr_schedule == "linear":
        return train.lr * (1.0 - progress)
    return train.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
