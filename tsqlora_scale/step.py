"""One optimizer step on a global batch, the same for any number of ranks and any accumulation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from tsqlora_scale.engine.engine import Engine
    from tsqlora_scale.ranks.sensitivity import SensitivityTracker
    from tsqlora_scale.tasks import Task


@dataclass(frozen=True)
class StepResult:
    """What a step did: mean loss over the global batch, gradient 2-norm before clipping; whether to stop after it."""

    loss: float
    grad_norm: float
    stop: bool


def micro_batches(indices: np.ndarray, micro_batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """This rank's micro-batches of a global batch.

    The global batch of shape (batch_size,) is cut into consecutive micro-batches that are dealt to the ranks in
    turn, so the set of micro-batches does not depend on the number of ranks.
    """
    parts = indices.reshape(-1, micro_batch_size)
    return list(parts[rank::world_size])


def optimizer_step(
    engine: Engine,
    task: Task,
    tracker: SensitivityTracker | None,
    indices: np.ndarray,
    *,
    step: int,
    lr: float,
    micro_batch_size: int,
    seed: int,
    weights: np.ndarray | None = None,
    stop: bool = False,
) -> StepResult:
    """Forward and backward of every micro-batch, then one step. A collective.

    The loss is normalised by the number of loss terms (samples, or target tokens) of the whole step, so that
    padding, accumulation and the number of ranks do not change the gradient.

    Args:
        indices: pool rows of the global batch, (batch_size,).
        weights: of their losses, (batch_size,), up to a constant; none: all equal.
        stop: whether this rank was asked to stop; the result says whether any was.
    """
    world = engine.world
    weights = np.ones(len(indices)) if weights is None else weights
    parts = micro_batches(indices, micro_batch_size, world.rank, world.size)
    shares = [
        torch.from_numpy(part).float() for part in micro_batches(weights, micro_batch_size, world.rank, world.size)
    ]
    batches = [task.batch("train", part).to(world.device) for part in parts]
    counts = [
        (task.loss_terms(batch).cpu() * share).sum().double() for batch, share in zip(batches, shares, strict=True)
    ]
    terms = world.sum(torch.stack(counts).sum())
    loss_sum = torch.zeros((), dtype=torch.float64)
    grad_norm = None
    if tracker is not None:
        tracker.start_step(step, loss_scale=engine.gradient_scale)
    for number, (batch, share) in enumerate(zip(batches, shares, strict=True)):
        place = number * world.size + world.rank
        seed_dropout(seed, step, place)
        if tracker is not None:
            tracker.start_micro_batch(batch.size, place * micro_batch_size)
        with engine.micro_batch():
            sums, _ = task.losses(engine.forward(**batch.inputs), batch)
            sums = sums * share.to(sums)
            loss_sum += sums.detach().double().sum().cpu()
            grad_norm = engine.backward(sums.sum() / terms.to(sums), lr)
    if tracker is not None:
        tracker.end_step()
    assert grad_norm is not None, "the last micro-batch of a step must be an accumulation boundary"
    loss_sum, asked = world.sum(torch.stack([loss_sum, loss_sum.new_tensor(float(stop))]))
    return StepResult(loss=float(loss_sum / terms), grad_norm=grad_norm, stop=bool(asked > 0))


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Seed the global generator, from which dropout draws.

    Masks are a function of the step and the micro-batch's place in the global batch: a resumed run repeats them, and
    so does any number of ranks with the same micro_batch_size.
    """
    digest = hashlib.sha256(f"{seed}/dropout/{step}/{micro_batch}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
