"""One scoring pass: loss, gradient norm, loss reduction and sketch of every sample (paper 2.1)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import ScoringConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.transfers import HostCopy
from tsqlora_scale.quality.gradients.batch_memory import (
    LiveBytes,
    bytes_kept,
    fitting_batch,
    free_bytes,
    reuse_freed_memory,
)
from tsqlora_scale.quality.gradients.folds import Update
from tsqlora_scale.quality.gradients.per_sample import PerSampleGradients
from tsqlora_scale.quality.gradients.sketch import Sketch
from tsqlora_scale.quality.pool import BatchT, Pool
from tsqlora_scale.quality.scores.loss_reduction import NOISE_ROUNDINGS
from tsqlora_scale.quality.scores.memory_guard import MemoryGuard
from tsqlora_scale.quality.scores.score_parts import Kind, PassPart

log = logging.getLogger("tsqlora_scale")

#: samples on which memory is measured for ``batch_size: auto``
PROBE = 4
#: samples whose numbers in a batch are compared with those alone
CHECKED = 8


class Measurer(Generic[BatchT]):
    """Measures the samples of a pass, shard by shard.

    A shard is cut into batches that do not depend on the number of ranks; the ranks take them in turn, so that every
    sample's numbers are the same on any number of ranks. Every rank runs the same number of forwards and backwards
    (ZeRO-3 would hang otherwise).

    Batched per-sample gradients are exact only if every adapter call has the batch's dimension, or can be given it
    (:mod:`.batchless`). That is checked once in the structure and once in the numbers: eight samples of the first
    shard are scored alone too. A model that fails either is scored one sample at a time; the ranks decide together.
    Losses alone need the second check only.

    Every pass goes through a :class:`.MemoryGuard`, those of the checks and of the probe for memory among them.

    Attributes:
        update: what sketches are of, in first-order passes alone (:class:`.Folds`); None: gradients.
        one_at_a_time: the decision; None before the first batch of more than one sample.
        batch_size: samples per batch; None before ``scoring.batch_size: auto`` is decided.
        kind: of passes that the two were decided for; they are decided anew where another kind needs it.
    """

    def __init__(
        self,
        scoring: ScoringConfig,
        *,
        pool: Pool[BatchT],
        theta: Callable[[nn.Module], dict[str, nn.Linear]],
        seed: int,
        eta: float,
        world: World,
        update: Update | None = None,
    ) -> None:
        assert update is None or scoring.delta_loss == "first_order", "updates are sketched where gradients are folded"
        self.scoring = scoring
        self.eta = eta
        self.world = world
        self.pool = pool
        self.losses = pool.losses
        self._theta = theta
        self.one_at_a_time: bool | None = None
        self.batch_size: int | None = None if scoring.batch_size == "auto" else scoring.batch_size
        self.kind: Kind | None = None
        self._sketch = Sketch(scoring.sketch_dim, seed=seed)
        self.update = update
        self._sketches_wanted = scoring.convergence != "loss_trend"
        self._gradients: PerSampleGradients | None = None
        self._fits: int | None = None  # after an allocation failed
        self._guard: MemoryGuard | None = None

    @contextmanager
    def on(self, module: nn.Module) -> Iterator[None]:
        """Around the shards of a pass: ``module`` is in evaluation mode and no parameter requires grad."""
        if self.world.device.type == "cpu":
            reuse_freed_memory()
        with PerSampleGradients(module, self._theta(module)) as gradients:
            self._gradients = gradients
            self._guard = MemoryGuard(module, self.world, fits=self._fits)
            try:
                yield
            finally:
                self._fits = self._guard.fits
                self._gradients = self._guard = None

    def measure(
        self, indices: np.ndarray, *, kind: Kind, progress: Callable[[int], None] | None = None
    ) -> PassPart | None:
        """Measure the samples at pool ``indices``. Collective; rank 0 gets the rows, in that order, others None.

        ``progress`` is told the number of samples done, of all ranks together.

        Args:
            kind: ``exact`` takes the loss reduction by a second forward, ``first_order`` as ``eta * grad_norm**2``.
                ``loss`` makes no backward pass: norm and reduction are NaN, and there are no sketches.
        """
        gradients = self._gradients
        assert gradients is not None, "use inside 'with measurer.on(module)'"
        self.prepare(indices, kind)
        rows = self._shard(gradients, indices, kind, progress)
        if not self.one_at_a_time and self._on_any_rank(gradients.batchless is not None):
            self._warn(f"a later batch called {gradients.batchless} without the batch's dimension")
            self.one_at_a_time = True
            rows = self._shard(gradients, indices, kind, progress)
        return rows

    def prepare(self, indices: np.ndarray, kind: Kind) -> int:
        """Decide on batches for passes of a kind, by the samples at pool ``indices``; their size. Collective."""
        gradients = self._gradients
        assert gradients is not None, "use inside 'with measurer.on(module)'"
        self._turn_to(kind)
        if self.batch_size is None:
            self.batch_size = self._fitting_batch_size(gradients, indices)
        if self.one_at_a_time is None:
            self.one_at_a_time = self._cannot_batch(gradients, indices)
        return 1 if self.one_at_a_time else self.batch_size

    def _turn_to(self, kind: Kind) -> None:
        """Forget what was decided for passes of another kind and does not hold for this one."""
        if self.kind not in (None, kind):
            if self.scoring.batch_size == "auto":
                self.batch_size = None
            if "loss" in (self.kind, kind):
                self.one_at_a_time = None
        self.kind = kind

    def _batch(self, rows: np.ndarray) -> BatchT:
        batch: BatchT = self.pool.batch(rows, max_length=self.scoring.max_length).to(self.world.device)
        return batch

    def resume(self, batch_size: int | None, one_at_a_time: bool | None, kind: Kind) -> None:
        """Go on with a killed pass: its batches again, to the bit."""
        self._turn_to(kind)
        self.one_at_a_time = one_at_a_time
        if not one_at_a_time:
            self.batch_size = batch_size

    def state_dict(self) -> dict[str, Any]:
        """The decisions."""
        return {"one_at_a_time": self.one_at_a_time, "batch_size": self.batch_size, "kind": self.kind}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the decisions."""
        self.one_at_a_time, self.batch_size = state["one_at_a_time"], state["batch_size"]
        self.kind = state.get("kind")  # earlier ones do not say, and are of the kind that goes on

    def _shard(
        self,
        gradients: PerSampleGradients,
        indices: np.ndarray,
        kind: Kind,
        progress: Callable[[int], None] | None,
    ) -> PassPart | None:
        size = 1 if self.one_at_a_time else self.batch_size
        assert size is not None
        batches = _cut(indices, size)
        own: list[tuple[np.ndarray | Tensor, ...]] = []
        problem: UserError | None = None
        for turn in range(math.ceil(len(batches) / self.world.size)):
            chunks = [batches[(turn * self.world.size + r) % len(batches)] for r in range(self.world.size)]
            number, chunk = turn * self.world.size + self.world.rank, chunks[self.world.rank]
            try:
                measured = self._measured(gradients, chunk, kind, longest=max(map(len, chunks)))
                if number < len(batches):  # else a repeated batch, so that every rank runs as many
                    own.append((chunk, *measured))
            except UserError as error:
                problem = error  # perhaps of this rank alone: the others must not wait for it
            if progress is not None:
                progress(min(len(indices), (turn + 1) * self.world.size * size))
        with self.world.together():
            if problem is not None:
                raise problem
        found = self.world.gather_on_main([[np.asarray(column) for column in batch] for batch in own])
        if found is None:
            return None
        of_batches = [batch for rank in found for batch in rank]
        drawn, values, sketches = (np.concatenate(column) for column in zip(*of_batches, strict=True))
        order = np.argsort(drawn, kind="stable")[np.argsort(np.argsort(indices, kind="stable"), kind="stable")]
        return PassPart(
            drawn[order], values[order], sketches[order], gradients.rounding, size, self.one_at_a_time, kind
        )

    def _measured(
        self, gradients: PerSampleGradients, rows: np.ndarray, kind: Kind, *, longest: int | None = None
    ) -> tuple[Tensor, ...]:
        """:meth:`_chunk` in pieces that fit."""
        assert self._guard is not None
        return self._guard.run(kind, lambda piece: self._chunk(gradients, piece, kind), rows, longest=longest)

    def _chunk(self, gradients: PerSampleGradients, chunk: np.ndarray, kind: Kind) -> tuple[Tensor, Tensor]:
        """(B, 3) float64 of loss, norm and loss reduction, and sketches (B, sketch_dim), on the CPU."""
        batch = self._batch(chunk)
        sketch = torch.zeros(len(chunk), 0)
        if kind == "loss":
            before = gradients.losses_alone(self.losses, batch)
            norm = delta = torch.full_like(before, torch.nan)
        elif kind == "first_order":
            wanted = self._sketch if self._sketches_wanted else None
            before, norm, sketch = gradients.folded(self.losses, batch, sketch=wanted, update=self.update)
            delta = self.eta * norm**2
        else:
            before, of_theta = gradients.per_sample(self.losses, batch)
            assert of_theta, "the loss does not depend on any adapter"
            norms = [torch.linalg.vector_norm(g, dim=tuple(range(1, g.dim()))) for g in of_theta.values()]
            norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
            with gradients.stepped(of_theta, self.eta):
                delta = before - self.losses(gradients.module, batch).float()
            if self._sketches_wanted:
                sketch = self._sketch(of_theta)
        numbers, sketch = HostCopy(torch.stack([before, norm, delta], 1), sketch).tensors()  # the one wait for a GPU
        return numbers.double(), sketch

    def _fitting_batch_size(self, gradients: PerSampleGradients, indices: np.ndarray) -> int:
        """``scoring.batch_size: auto``: what the longest samples of the shard leave room for. Collective.

        Measured on one sample and, where there is room for more, on a few.
        """
        longest = indices[::-1]  # a shard is sorted by length
        fits = self._fitting_by(gradients, longest[:1])
        return fits if fits == 1 else self._fitting_by(gradients, longest[: min(fits, PROBE)])

    def _fitting_by(self, gradients: PerSampleGradients, rows: np.ndarray) -> int:
        assert self._guard is not None
        kind = self.kind
        assert kind is not None

        def measured(piece: np.ndarray) -> tuple[Tensor]:
            batch = self._batch(piece)
            taken = self._losses_memory(gradients, batch) if kind == "loss" else self._memory(gradients, batch, kind)
            return (torch.full((len(piece),), taken / len(piece)),)

        try:
            with self.world.together():
                (taken,) = self._guard.run("gradients" if kind == "exact" else kind, measured, rows)
        finally:
            gradients.recomputed = None
        device = self.world.device
        fits = fitting_batch(float(taken.max()), free_bytes(device, self.world.size_here), device)
        fits = min(fits, self._guard.fits or fits)
        return -int(self.world.max(torch.tensor([-fits])).item())

    def _memory(self, gradients: PerSampleGradients, batch: BatchT, kind: Kind) -> int:
        """Bytes of a backward pass of the batch."""
        gradients.recomputed = 0
        if kind == "exact":
            kept = bytes_kept(gradients.module, lambda: gradients.per_sample(self.losses, batch))
            own = 2 * gradients.held  # there twice, the second time on its way into the sketch
        else:
            sketch = self._sketch if self._sketches_wanted else None
            kept = bytes_kept(
                gradients.module, lambda: gradients.folded(self.losses, batch, sketch=sketch, update=self.update)
            )
            own = gradients.held
        return kept + (gradients.recomputed or 0) + own

    def _losses_memory(self, gradients: PerSampleGradients, batch: BatchT) -> int:
        """Bytes of a forward pass of the batch."""
        with LiveBytes(gradients.module.parameters()) as live:
            gradients.losses_alone(self.losses, batch)
        peak: int = live.peak
        return peak

    def _cannot_batch(self, gradients: PerSampleGradients, indices: np.ndarray) -> bool | None:
        """Whether samples must be scored one at a time; None if batches hold one sample anyway. Collective."""
        kind = self.kind
        assert self.batch_size is not None and self._guard is not None and kind is not None
        if min(self.batch_size, len(indices)) == 1:
            return None
        chosen = _spread(indices, CHECKED)
        if kind != "loss" and self._lacks_batch(gradients, chosen[:2], kind):
            return True

        def checked(piece: np.ndarray) -> tuple[Tensor, Tensor]:
            values, _ = self._chunk(gradients, piece, kind)
            return values, torch.full((len(piece),), gradients.positions)

        with self.world.together():
            (batched, wide), (alone, narrow) = (
                [torch.cat(x) for x in zip(*(self._guard.run(kind, checked, rows) for rows in cut), strict=True)]
                for cut in (_cut(chosen, min(self.batch_size, len(chosen))), _cut(chosen, 1))
            )
        if self._on_any_rank(not self._agree(batched, alone, gradients.rounding, padded=wide > narrow)):
            self._warn("scores of samples in a batch differ from their scores alone")
            return True
        return False

    def _lacks_batch(self, gradients: PerSampleGradients, rows: np.ndarray, kind: Kind) -> bool:
        """Whether an adapter is called without the batch's dimension. Collective."""
        assert self._guard is not None

        def structure(piece: np.ndarray) -> tuple[Tensor]:
            if kind == "exact":
                gradients.per_sample(self.losses, self._batch(piece))
            else:
                gradients.folded(self.losses, self._batch(piece), sketch=None)
            return (torch.zeros(len(piece)),)

        with self.world.together():
            self._guard.run("gradients" if kind == "exact" else kind, structure, rows)
        batchless, gradients.batchless = gradients.batchless, None
        found = self._on_any_rank(batchless is not None)
        if found and self.world.is_main:
            log.warning(
                "%s is called without the batch's dimension, so its gradients cannot be told apart by sample; "
                "this model is scored one sample at a time (scoring.max_samples bounds the cost)",
                batchless,
            )
        return found

    @staticmethod
    def _agree(together: Tensor, alone: Tensor, eps: float, *, padded: Tensor | None = None) -> bool:
        """Whether more than half of the samples have equal numbers: to 0.1 % in float32 (looser in half precision), or
        both not finite.

        A sample that the model knows has a small gradient, a difference of nearly equal probabilities, that is mostly
        rounding: by ``eps`` of what it is where nothing is known, about the norm over the loss.

        Args:
            padded: (B,) bool, the samples that were wider in their batch than alone. Where there are any, they alone
                count: what padding does wrong, it does to no other.
        """
        loss, norm = alone[:, 0].abs(), alone[:, 1]
        tolerance = max(1e-3, 12 * eps)
        noise = NOISE_ROUNDINGS * eps * (1 + loss)  # of a loss
        of_norm = 2 * eps * norm / loss.clamp(min=eps, max=1.0)
        slack = torch.stack([noise, of_norm, noise], 1) + tolerance * alone.abs()
        equal = (((together - alone).abs() <= slack) | ~(together.isfinite() | alone.isfinite())).all(1)
        counted = equal if padded is None or not padded.any() else equal[padded]
        return bool(counted.double().mean() > 0.5)

    def _on_any_rank(self, flag: bool) -> bool:
        return bool(self.world.max(torch.tensor([int(flag)])).item())

    def _warn(self, reason: str) -> None:
        if self.world.is_main:
            log.warning("%s; this model is scored one sample at a time", reason)


def _cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _spread(indices: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of ``indices``, which are sorted by length: the shortest, the longest, the next ones from both
    ends in turn, so that any two that follow one another differ in length as far as may be."""
    places = np.unique(np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int))
    turns = np.stack([places, places[::-1]], 1).reshape(-1)[: len(places)]
    chosen: np.ndarray = indices[turns]
    return chosen
