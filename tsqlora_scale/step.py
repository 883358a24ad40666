"""One optimizer step on a global batch, the same for any number of ranks and any accumulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from tsqlora_scale.common.random_streams import seed_dropout
from tsqlora_scale.engine.transfers import HostCopy, to_device
from tsqlora_scale.quality.online.sample_listener import DeafListener, SampleListener
from tsqlora_scale.tasks.evaluation import evaluating
from tsqlora_scale.tasks.logit_gaps import squared_gaps
from tsqlora_scale.tasks.losses import on_known_terms

if TYPE_CHECKING:
    from tsqlora_scale.engine.collectives import World
    from tsqlora_scale.engine.engine import Engine
    from tsqlora_scale.tasks import Batch, Task
    from tsqlora_scale.tasks.packing import Packing


@dataclass(frozen=True)
class Teacher:
    """The model with other values of what trains, whose logits the step is to stay near to.

    Attributes:
        values: full, by parameter name, of the parameters' shapes.
        weight: of the mean squared error of the logits, beside the loss.
    """

    values: Mapping[str, torch.Tensor]
    weight: float

    def logits(self, engine: Engine, task: Task, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Of every batch the logits that a loss is taken at, in evaluation mode and without a graph. A collective where
        parameters are sharded: every rank has as many batches."""
        with engine.holding(self.values), evaluating(engine.module):
            return [task.needed(task.outputs(engine.module, batch), batch) for batch in batches]


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank.

    Attributes:
        loss: mean over the global batch, a teacher's part aside.
        grad_norm: 2-norm of the gradient before clipping.
        stop: whether any rank was asked to stop.
        taken: whether the optimizer has stepped; it has not where the loss or the gradient is not finite.
        failed: whether that was no loss scaler's doing.
        culprits: pool rows of the samples whose own loss is not finite, sorted; empty for a step that was taken.
        teacher_gap: mean squared error of the logits to a teacher's, before its weight; None without one.
    """

    loss: float
    grad_norm: float
    stop: bool
    taken: bool = True
    failed: bool = False
    culprits: tuple[int, ...] = ()
    teacher_gap: float | None = None


def micro_batches(indices: np.ndarray, micro_batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """This rank's micro-batches of a global batch.

    The global batch of shape (batch_size,) is cut into consecutive micro-batches that are dealt to the ranks in
    turn, so the set of micro-batches does not depend on the number of ranks.
    """
    parts = indices.reshape(-1, micro_batch_size)
    return list(parts[rank::world_size])


def longest_first(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A global batch from its longest sample to its shortest.

    The samples of a micro-batch are padded little, micro-batches that are dealt to the ranks at once take a like time,
    and a batch that is too large for the memory is so at once. The order depends on neither the number of ranks nor the
    size of a micro-batch, and so neither do the samples that sensitivities are taken of, by their places in it.

    Args:
        rows: of the pool, (batch_size,).
        lengths: of them, (batch_size,), in any unit.
    """
    return rows[np.argsort(-lengths, kind="stable")]


class StepListener(Protocol):
    """Told of a step's passes, so that it can hear gradients in them: the rank half of a run."""

    def start_step(self, step: int, *, loss_scale: float) -> None:
        """The step that follows ``step`` finished ones begins; ``loss_scale`` is the engine's ``gradient_scale``."""
        ...

    def start_micro_batch(self, size: int, position: int, packing: Packing | None = None) -> None:
        """A forward and backward pass over ``size`` samples, of the global batch from ``position`` on, begins; with
        ``packing`` they stand end to end in it."""
        ...

    def end_step(self, *, taken: bool) -> None:
        """The step's last backward pass is over; ``taken`` says whether the optimizer has stepped."""
        ...


def optimizer_step(
    engine: Engine,
    task: Task,
    rows: np.ndarray,
    *,
    listener: StepListener,
    step: int,
    lr: float,
    micro_batch_size: int,
    seed: int,
    batches: Sequence[Batch] | None = None,
    samples: SampleListener | None = None,
    weights: np.ndarray | None = None,
    teacher: Teacher | None = None,
    stop: bool = False,
    beat: Callable[[], None] = lambda: None,
) -> StepResult:
    """Forward and backward of every micro-batch, then one step. A collective.

    The loss is normalised by the number of loss terms (samples, or target tokens) of the whole step: padding,
    accumulation and the number of ranks do not change the gradient. A loss that is not finite makes the gradient not
    finite on all ranks, and all leave the step out: parameters, moments and sensitivity stay as they are.

    The host waits for a GPU once, for the gradient's norm: terms are counted before a batch is copied, losses are
    summed where they are, and what is said of them comes along.

    Args:
        rows: of the pool, the global batch, (batch_size,).
        listener: told of every pass.
        step: optimizer steps finished.
        batches: of this rank's :func:`micro_batches` of ``rows``, on the host; none: they are made here.
        samples: told of every pass, and of what all ranks have heard of the samples in it; none: nobody is.
        weights: of the rows' losses, (batch_size,), up to a constant; none: all equal.
        teacher: to whose logits those of the step are drawn, by the same terms and weights as the loss; none: nobody.
        stop: whether this rank was asked to stop; the result says whether any was.
        beat: called after every micro-batch.
    """
    world, samples = engine.world, samples or DeafListener()
    weights = np.ones(len(rows)) if weights is None else weights
    parts = micro_batches(rows, micro_batch_size, world.rank, world.size)
    on_host = [
        torch.from_numpy(part).float() for part in micro_batches(weights, micro_batch_size, world.rank, world.size)
    ]
    batches = [task.batch(part) for part in parts] if batches is None else batches
    terms = count_terms(world, task, batches, on_host)
    batches, shares = [b.to(world.device) for b in batches], [to_device(share, world.device) for share in on_host]
    taught = [None] * len(batches) if teacher is None else teacher.logits(engine, task, batches)
    loss_sum, gap_sum = torch.zeros((2,), dtype=torch.float64, device=world.device)
    losses: list[torch.Tensor] = []
    gradient_scale = engine.gradient_scale
    listener.start_step(step, loss_scale=gradient_scale)
    samples.start_step(step, len(rows))
    for number, (batch, share, logits) in enumerate(zip(batches, shares, taught, strict=True)):
        place = number * world.size + world.rank
        seed_dropout(seed, step, place)
        for one in (listener, samples):
            _announce(one, batch, place * micro_batch_size)
        with engine.micro_batch():
            outputs = task.outputs(engine.module, batch, forward=engine.forward)
            sums, counts = on_known_terms(*task.loss_sums(outputs, batch), task.loss_terms(batch))
            own, share, of_all = sums.detach() / counts, share.to(sums), terms.to(sums)
            sums = sums * share
            loss_sum += sums.detach().double().sum()
            if teacher is not None and logits is not None:
                gaps = squared_gaps(task.needed(outputs, batch), logits, batch.targets, batch.places) * share
                gap_sum += gaps.detach().double().sum()
                sums = sums + teacher.weight * gaps
            losses.append(sums.detach())
            finite = torch.where((loss_sum + gap_sum).isfinite(), 1.0, math.nan)
            engine.backward(sums.sum() / of_all * finite)
        samples.end_micro_batch(own, of_all / (gradient_scale * share * counts))
        beat()
    of_step = torch.stack([loss_sum, torch.full_like(loss_sum, float(stop)), gap_sum])
    told = HostCopy(world.sum(torch.cat([of_step, samples.numbers(of_step)])), terms)
    grad_norm = engine.step(lr)
    listener.end_step(taken=math.isfinite(grad_norm))
    (total, asked, gap, *_), (count,) = told.read()
    samples.take(rows, told.tensors()[0][3:], taken=math.isfinite(grad_norm))
    result = outcome_of(engine, total / count if count else math.nan, grad_norm, asked > 0, parts, losses)
    return result if teacher is None else replace(result, teacher_gap=gap / count if count else math.nan)


def _announce(listener: StepListener | SampleListener, batch: Batch, position: int) -> None:
    """One of a user's own may know nothing of packing, and needs to where samples are packed alone."""
    if batch.packing is None:
        listener.start_micro_batch(batch.size, position)
    else:
        listener.start_micro_batch(batch.size, position, batch.packing)


def outcome_of(
    engine: Engine, loss: float, grad_norm: float, stop: bool, parts: list[np.ndarray], losses: list[torch.Tensor]
) -> StepResult:
    """What is said of a step; of one that was left out, also by which samples. A collective."""
    taken = math.isfinite(grad_norm)
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        stop=stop,
        taken=taken,
        failed=not taken and not (math.isfinite(loss) and engine.overflow_is_normal),
        culprits=() if taken else not_finite(engine.world, parts, losses),
    )


def count_terms(world: World, task: Task, batches: Sequence[Batch], shares: Sequence[torch.Tensor]) -> torch.Tensor:
    """Loss terms of the whole step, each counted by its sample's weight: a float64 scalar on the rank's device. A
    collective.

    Args:
        batches: this rank's micro-batches, still on the host.
        shares: weights of their samples, (micro_batch_size,) each, likewise.
    """
    counts = [(task.loss_terms(batch) * share).sum().double() for batch, share in zip(batches, shares, strict=True)]
    return world.sum(to_device(torch.stack(counts).sum(), world.device))


def not_finite(world: World, parts: list[np.ndarray], losses: list[torch.Tensor]) -> tuple[int, ...]:
    """Pool rows of the samples whose loss is not finite, of all ranks. A collective.

    Args:
        parts: this rank's micro-batches, pool rows, (micro_batch_size,) each.
        losses: of their samples, (micro_batch_size,) each.
    """
    mine = [part[~loss.isfinite().cpu().numpy()] for part, loss in zip(parts, losses, strict=True)]
    return tuple(sorted({int(row) for row in np.concatenate(world.gather_objects(np.concatenate(mine)))}))
