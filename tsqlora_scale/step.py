"""One optimizer step on a global batch, the same for any number of ranks and any accumulation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from tsqlora_scale.engine.collectives import World
    from tsqlora_scale.engine.engine import Engine
    from tsqlora_scale.ranks.sensitivity import SensitivityTracker
    from tsqlora_scale.tasks import Task


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank.

    Attributes:
        loss: mean over the global batch.
        grad_norm: 2-norm of the gradient before clipping.
        stop: whether any rank was asked to stop.
        taken: whether the optimizer has stepped; it has not where the loss or the gradient is not finite.
        failed: whether that was no loss scaler's doing.
        culprits: pool rows of the samples whose own loss is not finite, sorted; empty for a step that was taken.
    """

    loss: float
    grad_norm: float
    stop: bool
    taken: bool = True
    failed: bool = False
    culprits: tuple[int, ...] = ()


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
    beat: Callable[[], None] = lambda: None,
) -> StepResult:
    """Forward and backward of every micro-batch, then one step. A collective.

    The loss is normalised by the number of loss terms (samples, or target tokens) of the whole step, so that
    padding, accumulation and the number of ranks do not change the gradient.

    A loss that is not finite makes the rank's gradient not finite, if it is not so anyway. The exchange carries that
    to all ranks, and all leave the step out: parameters, moments and sensitivity stay as they are.

    Args:
        indices: pool rows of the global batch, (batch_size,).
        weights: of their losses, (batch_size,), up to a constant; none: all equal.
        stop: whether this rank was asked to stop; the result says whether any was.
        beat: called after every micro-batch.
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
    losses: list[torch.Tensor] = []
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
            losses.append(sums.detach())
            loss_sum += sums.detach().double().sum().cpu()
            finite = 1.0 if loss_sum.isfinite() else math.nan
            grad_norm = engine.backward(sums.sum() / terms.to(sums) * finite, lr)
        beat()
    assert grad_norm is not None, "the last micro-batch of a step must be an accumulation boundary"
    taken = math.isfinite(grad_norm)
    if tracker is not None:
        tracker.end_step(taken=taken)
    loss_sum, asked = world.sum(torch.stack([loss_sum, loss_sum.new_tensor(float(stop))]))
    loss = float(loss_sum / terms)
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        stop=bool(asked > 0),
        taken=taken,
        failed=not taken and not (math.isfinite(loss) and engine.overflow_is_normal),
        culprits=() if taken else not_finite(world, parts, losses),
    )


def not_finite(world: World, parts: list[np.ndarray], losses: list[torch.Tensor]) -> tuple[int, ...]:
    """Pool rows of the samples whose loss is not finite, of all ranks. A collective.

    Args:
        parts: this rank's micro-batches, pool rows, (micro_batch_size,) each.
        losses: of their samples, (micro_batch_size,) each.
    """
    mine = [part[~loss.isfinite().cpu().numpy()] for part, loss in zip(parts, losses, strict=True)]
    return tuple(sorted({int(row) for row in np.concatenate(world.gather_objects(np.concatenate(mine)))}))


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Seed the global generator, from which dropout draws.

    Masks are a function of the step and the micro-batch's place in the global batch: a resumed run repeats them, and
    so does any number of ranks with the same micro_batch_size.
    """
    digest = hashlib.sha256(f"{seed}/dropout/{step}/{micro_batch}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
