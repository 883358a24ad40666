"""``task.demonstrations``: training rows that stand, answered, before every prompt."""

from __future__ import annotations

import datasets
import numpy as np

from tsqlora_scale.common.disk_arrays import blocks
from tsqlora_scale.common.random_streams import philox
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.objectives.prompt_text import DEMONSTRATED

#: Rows of answers that are in memory at once.
ROWS = 2**16


def draw_demonstrations(cfg: TaskConfig, pool: datasets.Dataset, *, seed: int) -> list[list[str]]:
    """``task.demonstrations`` rows of every class, its texts and then the class's number, the classes in turn.

    Of a class with fewer rows they are all. Of a text the first :data:`.DEMONSTRATED` characters are kept.

    Args:
        pool: the training rows, whose label column holds class ids.
        seed: of the run, by which they are drawn.
    """
    rows = class_sample(cfg, pool, cfg.demonstrations, seed=seed, purpose="demonstrations")
    turns = [row for turn in range(cfg.demonstrations) for own in rows if turn < len(own) for row in [int(own[turn])]]
    names = [*cfg.text, str(cfg.label)]
    cells = pool.select_columns(list(dict.fromkeys(names)))[turns]
    found = zip(*(cells[name] for name in names), strict=True)
    return [[*(str(text)[:DEMONSTRATED] for text in texts), str(number)] for *texts, number in found]


def class_sample(cfg: TaskConfig, pool: datasets.Dataset, most: int, *, seed: int, purpose: str) -> list[np.ndarray]:
    """Up to ``most`` rows of every class, in the order in which they are drawn."""
    view = pool.select_columns([str(cfg.label)]).with_format("arrow")
    parts = [view[block][str(cfg.label)].to_numpy() for block in blocks(len(view), ROWS)]
    labels = np.concatenate(parts)
    drawn = []
    for number in range(cfg.num_labels):
        own = np.flatnonzero(labels == number)
        drawn.append(philox(seed, purpose, number).permutation(own)[:most])
    return drawn
