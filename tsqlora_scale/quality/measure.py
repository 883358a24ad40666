"""One scoring pass: loss, gradient norm, loss reduction and sketch of every sample (METHOD 1)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Generic

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora_scale.config import ScoringConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.errors import UserError
from tsqlora_scale.quality.gradients import Batch, LossFn, PerSampleGradients
from tsqlora_scale.quality.sketch import Sketch

log = logging.getLogger("tsqlora_scale")

#: roundings of the forward's type that a loss reduction must exceed to be told from noise
NOISE_ROUNDINGS = 16


@dataclass
class Measured:
    """What a pass found out about this rank's samples.

    Attributes:
        indices: pool indices, (n,).
        loss, grad_norm, delta_loss: (n,) float64.
        sketches: (n, sketch_dim) float32 on the CPU; None where the convergence term needs none.
        rounding: machine epsilon of the forward.
    """

    indices: np.ndarray
    loss: np.ndarray
    grad_norm: np.ndarray
    delta_loss: np.ndarray
    sketches: Tensor | None
    rounding: float


class Measurer(Generic[Batch]):
    """Runs scoring passes. Every rank runs the same number of forwards and backwards of the same batch size.

    Batched per-sample gradients are exact only if every adapter call has the batch's dimension, or can be given it
    (:mod:`tsqlora_scale.quality.batchless`). That is checked once in the structure and once in the numbers: two
    samples of the first batch are scored alone too. A model that fails either is scored one sample at a time; the
    ranks decide together.

    Attributes:
        one_at_a_time: the decision; None before the first batch of more than one sample.
    """

    def __init__(
        self,
        scoring: ScoringConfig,
        *,
        seed: int,
        eta: float,
        world: World,
        batch_of: Callable[[np.ndarray], Batch],
        losses: LossFn[Batch],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.scoring = scoring
        self.eta = eta
        self.world = world
        self.batch_of = batch_of
        self.losses = losses
        self.progress = progress
        self.one_at_a_time: bool | None = None
        self._sketch = Sketch(scoring.sketch_dim, seed=seed)
        self._sketches_wanted = scoring.convergence != "loss_trend"

    def measure(self, module: nn.Module, indices: np.ndarray, *, exact: bool) -> Measured:
        """Measure the samples at pool ``indices``, of which this rank takes every world-size-th. Collective.

        ``exact`` takes the loss reduction by a second forward, otherwise it is ``eta * grad_norm**2``.
        """
        with PerSampleGradients(module, include_head=self.scoring.include_head) as gradients:
            if self.one_at_a_time is None:
                self.one_at_a_time = self._cannot_batch(gradients, indices, exact)
            measured = self._pass(gradients, indices, exact)
            if not self.one_at_a_time and self._on_any_rank(gradients.batchless is not None):
                self._warn(f"a later batch called {gradients.batchless} without the batch's dimension")
                self.one_at_a_time = True
                measured = self._pass(gradients, indices, exact)
        return measured

    def mean_sketch(self, module: nn.Module, batches: Iterable[Batch]) -> Tensor:
        """Sketch (sketch_dim,) float64 of the mean gradient over ``batches``, the same on every rank. Collective.

        Every rank gets the same batches and takes every world-size-th. A batch whose gradient is not finite is
        left out.

        Raises:
            UserError: there is no sample in them.
        """
        total = torch.zeros(self.scoring.sketch_dim + 1, dtype=torch.float64)
        iterator = iter(batches)
        with PerSampleGradients(module, include_head=self.scoring.include_head) as gradients:
            while group := list(islice(iterator, self.world.size)):
                mine = group[min(self.world.rank, len(group) - 1)]  # the same number of forwards on every rank
                sketch = self._sketch(gradients.total(self.losses, mine)[1])[0].double().cpu()
                if self.world.rank < len(group) and bool(sketch.isfinite().all()):
                    total[:-1] += sketch
                    total[-1] += mine.size
        total = self.world.sum(total)
        if total[-1] == 0:
            raise UserError(
                "scoring.convergence='target' needs held-out samples with finite gradients and found none; "
                "give a development set or set scoring.convergence=alignment"
            )
        return total[:-1] / total[-1]

    def _batch_size(self, count: int) -> int:
        per_rank = math.ceil(count / self.world.size)
        return 1 if self.one_at_a_time else min(self.scoring.batch_size, per_rank)

    def _share(self, indices: np.ndarray) -> np.ndarray:
        """This rank's samples; where there are fewer samples than ranks, some ranks have none."""
        return indices[self.world.rank :: self.world.size]

    def _pass(self, gradients: PerSampleGradients, indices: np.ndarray, exact: bool) -> Measured:
        mine, size = self._share(indices), self._batch_size(len(indices))
        rounds = math.ceil(math.ceil(len(indices) / self.world.size) / size)
        filler = mine[-1:] if len(mine) else indices[:1]
        padded = np.concatenate([mine, np.repeat(filler, rounds * size - len(mine))])
        values, sketches = [], []
        for done, chunk in enumerate(padded.reshape(rounds, size), start=1):
            numbers, sketch = self._chunk(gradients, chunk, exact)
            values.append(numbers)
            sketches.append(sketch)
            if self.progress is not None:
                self.progress(done, rounds)
        loss, norm, delta = torch.cat(values)[: len(mine)].numpy().T
        kept = torch.cat(sketches)[: len(mine)] if self._sketches_wanted else None
        return Measured(mine, loss, norm, delta, kept, gradients.rounding)

    def _chunk(self, gradients: PerSampleGradients, chunk: np.ndarray, exact: bool) -> tuple[Tensor, Tensor]:
        """(B, 3) float64 of loss, norm and loss reduction, and sketches (B, sketch_dim), on the CPU."""
        batch = self.batch_of(chunk)
        before, of_theta = gradients.per_sample(self.losses, batch)
        assert of_theta, "the loss does not depend on any adapter"
        norms = [torch.linalg.vector_norm(g, dim=tuple(range(1, g.dim()))) for g in of_theta.values()]
        norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        if exact:
            with gradients.stepped(of_theta, self.eta):
                after = self.losses(gradients.module, batch).float()
            delta = before - after
        else:
            delta = self.eta * norm**2
        sketch = self._sketch(of_theta).cpu() if self._sketches_wanted else torch.zeros(len(chunk), 0)
        return torch.stack([before, norm, delta], 1).cpu().double(), sketch

    def _cannot_batch(self, gradients: PerSampleGradients, indices: np.ndarray, exact: bool) -> bool | None:
        """Whether samples must be scored one at a time; None if batches hold one sample anyway. Collective."""
        size = self._batch_size(len(indices))
        if size == 1:
            return None
        share = self._share(indices)
        chunk = np.resize(share if len(share) else indices[:1], size)
        gradients.per_sample(self.losses, self.batch_of(chunk))
        batchless, gradients.batchless = gradients.batchless, None
        if self._on_any_rank(batchless is not None):
            if self.world.is_main:
                log.warning(
                    "%s is called without the batch's dimension, so its gradients cannot be told apart by sample; "
                    "this model is scored one sample at a time (scoring.max_samples bounds the cost)",
                    batchless,
                )
            return True
        ends = [0, size - 1]
        together = self._chunk(gradients, chunk, exact)[0][ends]
        alone = torch.cat([self._chunk(gradients, chunk[[i]], exact)[0] for i in ends])
        if self._on_any_rank(not self._agree(together, alone, gradients.rounding)):
            self._warn("scores of samples in a batch differ from their scores alone")
            return True
        return False

    @staticmethod
    def _agree(together: Tensor, alone: Tensor, eps: float) -> bool:
        """Equal to 0.1 % in float32 (looser in half precision), or both not finite."""
        tolerance = max(1e-3, 12 * eps)
        noise = NOISE_ROUNDINGS * eps * (1 + alone[:, 0].abs())  # of a loss; a norm is not a difference and has none
        slack = torch.stack([noise, torch.zeros_like(noise), noise], 1) + tolerance * alone.abs()
        return bool((((together - alone).abs() <= slack) | ~(together.isfinite() | alone.isfinite())).all())

    def _on_any_rank(self, flag: bool) -> bool:
        return bool(self.world.max(torch.tensor([int(flag)])).item())

    def _warn(self, reason: str) -> None:
        if self.world.is_main:
            log.warning("%s; this model is scored one sample at a time", reason)
