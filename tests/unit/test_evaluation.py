"""Evaluation sharded over ranks: every row once, in order, with equally many batches on each rank."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from torch import nn

from tsqlora_scale.engine.collectives import World
from tsqlora_scale.tasks.evaluation import evaluate


class Batch:
    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def to(self, device: Any) -> Batch:
        return self


class Task:
    """Predicts ten times the row's number; its one metric is what it was given."""

    def __init__(self, total: int) -> None:
        self.dev = range(total)
        self.batches: list[list[int]] = []

    def lengths(self, split: str) -> np.ndarray:
        return np.random.default_rng(0).integers(1, 9, len(self.dev))

    def batch(self, indices: np.ndarray, *, split: str) -> Batch:
        return Batch(indices)

    def predict(self, module: nn.Module, batch: Batch, *, synced: bool) -> list[int]:
        assert not module.training
        self.batches.append(batch.rows.tolist())
        return [10 * int(row) for row in batch.rows]

    def references(self, rows: range, *, split: str) -> list[int]:
        return list(rows)

    def metrics(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        return {"predictions": predictions, "references": references}


class Threads(World):
    """Ranks as threads that meet at a barrier."""

    def __init__(self, rank: int, size: int, box: list[Any], meet: threading.Barrier) -> None:
        super().__init__(rank, size)
        self.box, self.meet = box, meet

    def gather_objects(self, value: Any) -> list[Any]:
        self.box[self.rank] = value
        self.meet.wait(10)
        values = list(self.box)
        self.meet.wait(10)
        return values


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("total", [1, 4, 9, 17])
def test_every_row_once_and_in_order(total: int, size: int) -> None:
    box, meet = [None] * size, threading.Barrier(size)
    tasks = [Task(total) for _ in range(size)]
    found: dict[int, dict[str, Any]] = {}

    def rank(number: int) -> None:
        world = Threads(number, size, box, meet)
        found[number] = evaluate(nn.Linear(1, 1), tasks[number], world, batch_size=4)  # type: ignore[arg-type]

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    expected = {"predictions": [10 * row for row in range(total)], "references": list(range(total))}
    assert found == dict.fromkeys(range(size), expected)
    counts = {len(task.batches) for task in tasks}
    assert len(counts) == 1, "ZeRO-3's gathers need every rank in every forward"
    assert all(len(batch) <= 4 for task in tasks for batch in task.batches)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was(training: bool) -> None:
    module = nn.Linear(1, 1).train(training)
    evaluate(module, Task(3), World(), batch_size=2)  # type: ignore[arg-type]
    assert module.training is training
