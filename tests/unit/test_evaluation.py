"""Evaluation sharded over ranks: every row once, in order, with equally many batches on each rank."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tsqlora_scale.engine.collectives import World
from tsqlora_scale.tasks.evaluation import evaluate
from tsqlora_scale.tasks.metrics import SampleLosses


class Batch:
    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        self.inputs = {"input": torch.from_numpy(rows).float()[:, None]}

    def to(self, device: Any) -> Batch:
        return self


class Task:
    """Predicts ten times the row's number; its one metric is what it was given."""

    def __init__(self, total: int, needs: str = "answers") -> None:
        self.dev = range(total)
        self.batches: list[list[int]] = []
        self.needs_answers, self.needs_losses = "answers" in needs, "losses" in needs
        self.answers_by_forward = True

    def lengths(self, split: str) -> np.ndarray:
        return np.random.default_rng(0).integers(1, 9, len(self.dev))

    def batch(self, indices: np.ndarray, *, split: str) -> Batch:
        return Batch(indices)

    def predict(self, module: nn.Module, batch: Batch, *, synced: bool, outputs: torch.Tensor | None) -> list[int]:
        assert not module.training
        assert self.needs_losses == (outputs is not None)
        self.batches.append(batch.rows.tolist())
        return [10 * int(row) for row in batch.rows]

    def outputs(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        outputs: torch.Tensor = module(**batch.inputs)
        return outputs

    def loss_sums(self, outputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums that depend on the batch as padding might, and terms that tell the rows apart."""
        rows = torch.from_numpy(batch.rows).float()
        return outputs[:, 0] / 3 + len(rows) * 1e-3, rows + 1

    def references(self, rows: range, *, split: str) -> list[int]:
        return list(rows)

    def metrics(self, predictions: list[int], references: list[int], losses: SampleLosses | None) -> dict[str, Any]:
        found = {} if losses is None else {"sums": losses.sums.tolist(), "terms": losses.terms.tolist()}
        return {"predictions": predictions, "references": references} | found


class Double(nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * input


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


def on_ranks(size: int, total: int, needs: str) -> tuple[dict[int, dict[str, Any]], list[Task]]:
    """What every rank finds, and the tasks that they have asked."""
    box, meet = [None] * size, threading.Barrier(size)
    tasks = [Task(total, needs) for _ in range(size)]
    found: dict[int, dict[str, Any]] = {}

    def rank(number: int) -> None:
        world = Threads(number, size, box, meet)
        found[number] = evaluate(Double(), tasks[number], world, batch_size=4)  # type: ignore[arg-type]

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found, tasks


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("total", [1, 4, 9, 17])
def test_every_row_once_and_in_order(total: int, size: int) -> None:
    found, tasks = on_ranks(size, total, "answers")
    expected = {"predictions": [10 * row for row in range(total)], "references": list(range(total))}
    assert found == dict.fromkeys(range(size), expected)
    counts = {len(task.batches) for task in tasks}
    assert len(counts) == 1, "ZeRO-3's gathers need every rank in every forward"
    assert all(len(batch) <= 4 for task in tasks for batch in task.batches)


@pytest.mark.parametrize("needs", ["losses", "answers and losses"])
@pytest.mark.parametrize("total", [1, 9, 17])
def test_losses_are_the_same_on_any_number_of_ranks(total: int, needs: str) -> None:
    alone, (task,) = on_ranks(1, total, needs)
    assert alone[0]["terms"] == [row + 1 for row in range(total)]
    assert np.allclose(alone[0]["sums"], [2 * row / 3 for row in range(total)], atol=5e-3)
    assert alone[0]["predictions"] == ([10 * row for row in range(total)] if "answers" in needs else [])
    assert bool(task.batches) == ("answers" in needs), "nobody asks for answers that no metric judges"
    for size in (2, 3):
        assert on_ranks(size, total, needs)[0] == dict.fromkeys(range(size), alone[0])


def test_a_failing_evaluation_leaves_the_mode_too() -> None:
    module = Double().train()
    task = Task(3)
    task.predict = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        evaluate(module, task, World(), batch_size=2)  # type: ignore[arg-type]
    assert module.training


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was(training: bool) -> None:
    module = nn.Linear(1, 1).train(training)
    evaluate(module, Task(3), World(), batch_size=2)  # type: ignore[arg-type]
    assert module.training is training
