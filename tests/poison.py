"""Losses and gradients that are not finite, in chosen micro-batches of a real run, on any engine."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection, Iterator
from typing import Any
from unittest import mock

import torch

from tsqlora_scale import step
from tsqlora_scale import training as train
from tsqlora_scale.tasks import Task

#: (step, place of the micro-batch in the global batch), which is the same on any number of ranks.
Places = Collection[tuple[int, int]]


class _Overflow(torch.autograd.Function):
    """Identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * math.inf


def what_was_heard(tracker: Any) -> str:
    """The sensitivities so far; those of this process's steps since the last event, too."""
    if tracker is None:
        return ""
    return json.dumps([tracker._ema, tracker._heard, [step.tolist() for step in tracker._pending]])


@contextlib.contextmanager
def poisoned(*, loss: Places = (), gradient: Places = ()) -> Iterator[None]:
    """Make the first sample's loss NaN, or every gradient infinite, in the micro-batches named.

    After every step that was left out, asserts that parameters, moments and sensitivities are as they were.
    """
    losses, seed_dropout, optimizer_step = Task.loss_sums, step.seed_dropout, train.optimizer_step
    place: list[tuple[int, int] | None] = [None]

    def placed(seed: int, number: int, micro_batch: int) -> None:
        place[0] = (number, micro_batch)
        seed_dropout(seed, number, micro_batch)

    def worse(task: Task, outputs: Any, batch: Any) -> Any:
        sums, counts = losses(task, outputs, batch)
        if sums.requires_grad and place[0] in loss:
            sums = sums + torch.tensor([math.nan, *[0.0] * (len(sums) - 1)])  # the gradient is what it was
        if sums.requires_grad and place[0] in gradient:
            sums = _Overflow.apply(sums)
        return sums, counts

    def checked(engine: Any, task: Any, rows: Any, **options: Any) -> Any:
        tracker = getattr(options["listener"], "tracker", None)
        before = engine.gather()
        heard = what_was_heard(tracker)
        result = optimizer_step(engine, task, rows, **options)
        place[0] = None
        after = engine.gather()
        same = [
            torch.equal(getattr(entry, part), getattr(after.params[name], part))
            for name, entry in before.params.items()
            for part in ("value", "exp_avg", "exp_avg_sq")
        ]
        bad = any(number == options["step"] for number, _ in {*loss, *gradient})
        assert result.taken != bad
        assert after.optimizer_steps == before.optimizer_steps + result.taken
        assert all(same) == bad
        assert (what_was_heard(tracker) == heard) == (bad or not (tracker and tracker.listens(options["step"])))
        return result

    with (
        mock.patch.object(Task, "loss_sums", worse),
        mock.patch.object(step, "seed_dropout", placed),
        mock.patch.object(train, "optimizer_step", checked),
    ):
        yield
