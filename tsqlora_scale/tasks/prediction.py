"""Answers to rows in their order, sharded over ranks, a window of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tsqlora_scale.tasks.evaluation import evaluating, own_batches

if TYPE_CHECKING:
    from torch import nn

    from tsqlora_scale.engine.collectives import World
    from tsqlora_scale.tasks import Task

#: Rows whose answers are in memory at once, and among which rows of a length are put together.
WINDOW = 2**14


@dataclass
class Answers:
    """Answers to some rows.

    Attributes:
        rows: which, (N,) int64.
        values: class ids, numbers or texts, N.
        probabilities: of every class, (N, C) float32; None where there are none.
    """

    rows: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    values: list[Any] = field(default_factory=list)
    probabilities: np.ndarray | None = None


def predict_windows(
    module: nn.Module,
    task: Task,
    world: World,
    answerable: np.ndarray,
    *,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[slice, Answers | None]]:
    """The held-out rows of ``task``, window by window, with their answers on rank 0 (elsewhere None). A collective.

    The rows of a window are batched as an evaluation of them would batch them.

    Args:
        module: unwrapped, whole on every rank.
        answerable: rows to be answered, (N,) bool; the others have none.
    """
    total = len(answerable)
    with world.together():
        lengths = task.lengths("dev")
    for start in range(0, total, WINDOW):
        window = slice(start, min(start + WINDOW, total))
        rows = start + np.flatnonzero(answerable[window])
        order = rows[np.argsort(lengths[rows], kind="stable")]

        def done(batches: int, whole: int, window: slice = window) -> None:
            if progress is not None:
                progress(window.start + (window.stop - window.start) * batches // whole, total)

        with evaluating(module):
            mine = _answers(module, task, world, order, batch_size, done)
        parts = world.gather_on_main(mine)
        yield window, None if parts is None else _in_order(parts)


def _answers(
    module: nn.Module,
    task: Task,
    world: World,
    order: np.ndarray,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> Answers:
    mine = Answers()
    found: list[np.ndarray] = []
    tables: list[np.ndarray] = []
    for rows, batch in own_batches(task, world, order, batch_size=batch_size, progress=progress):
        if rows is None:  # no parameters are sharded, so nobody waits for this rank
            continue
        values, probabilities = task.predict_in_full(module, batch, synced=False)
        found.append(rows)
        mine.values.extend(values)
        tables.extend([] if probabilities is None else [probabilities])
    return Answers(
        rows=np.concatenate(found) if found else mine.rows,
        values=mine.values,
        probabilities=np.concatenate(tables) if tables else None,
    )


def _in_order(parts: list[Answers]) -> Answers:
    rows = np.concatenate([part.rows for part in parts])
    at = np.argsort(rows, kind="stable")
    values = [value for part in parts for value in part.values]
    tables = [part.probabilities for part in parts if part.probabilities is not None]
    probabilities = np.concatenate(tables)[at] if tables else None
    return Answers(rows[at], [values[i] for i in at], probabilities)
