"""Quality scores of the pool: the passes, what is kept between them, and the table that they give (METHOD 1)."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora_scale.config import SamplingConfig, ScoringConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.errors import UserError
from tsqlora_scale.quality.gradients import Batch, LossFn
from tsqlora_scale.quality.measure import NOISE_ROUNDINGS, Measurer
from tsqlora_scale.quality.parts import Parts
from tsqlora_scale.quality.redundancy import neighbours, similar_pairs
from tsqlora_scale.quality.rng import philox, share_of
from tsqlora_scale.quality.select import renormalised, select_subset
from tsqlora_scale.quality.sketch import cosines
from tsqlora_scale.quality.standardise import Standardisation, log_probabilities, term_weights
from tsqlora_scale.quality.table import NEVER, ScoreTable, pool_fingerprint

log = logging.getLogger("tsqlora_scale")


@dataclass(frozen=True)
class PassReport:
    """What a scoring pass was and cost."""

    scoring_pass: int
    samples: int
    seconds: float
    one_at_a_time: bool
    not_finite: int


class QualityScorer(Generic[Batch]):
    """Scores a pool, once in full and then by light refreshes.

    Args:
        scoring, sampling: the config sections.
        seed: of the run; sketches, subsamples and the draw of S derive from it.
        eta: step size of the loss reduction.
        sample_ids: of the pool, in order; they are named in warnings.
        content: a digest of the pool's content, which with the ids ties checkpoints and parts to it.
        world: the ranks. They score disjoint shares and all hold the whole table.
        batch_of: samples at the given pool indices, on the device.
        losses: ``(module, batch) -> (batch.size,)`` losses of the samples, each its own mean, with a graph.
        target_batches: the held-out set of ``convergence: target``, the same batches on every rank.
        progress: told (samples done, samples of the pass).
        parts_folder: where the numbers of a pass are kept while it runs; None keeps them in memory.
        refuses_parts: whether parts of other data, weights or settings in that folder are an error, or are removed.
        length_of: lengths of the samples at the given indices; batches then hold samples of similar length.
        strata: groups of the pool, (N,) numbers from 0, that each keep their share of the draws; None is one group.

    Attributes:
        table: the last table; None before the first pass.
        report: what the last pass cost.
        neighbours: samples that teach the same as each, (N,), from the first pass; None without ``redundancy``.
        parts: rank 0's raw numbers and sketches of the last pass, until :meth:`discard_parts`.
    """

    def __init__(
        self,
        scoring: ScoringConfig,
        sampling: SamplingConfig,
        *,
        seed: int,
        eta: float,
        sample_ids: Sequence[str],
        content: str = "",
        world: World,
        batch_of: Callable[[np.ndarray], Batch],
        losses: LossFn[Batch],
        target_batches: Callable[[], Iterable[Batch]] | None = None,
        progress: Callable[[int, int], None] | None = None,
        length_of: Callable[[np.ndarray], np.ndarray] | None = None,
        strata: np.ndarray | None = None,
        parts_folder: Path | None = None,
        refuses_parts: bool = False,
    ) -> None:
        if sampling.redundancy and scoring.convergence == "loss_trend":
            raise UserError(
                "sampling.redundancy compares gradients, and scoring.convergence='loss_trend' keeps none; "
                "set scoring.convergence=alignment or sampling.redundancy=0"
            )
        if scoring.convergence == "target" and target_batches is None:
            raise UserError(
                "scoring.convergence='target' needs a held-out set; "
                "give task.dataset a development set or set scoring.convergence=alignment"
            )
        assert len(sample_ids) > 0, "an empty pool"
        self.scoring = scoring
        self.sampling = sampling
        self.seed = seed
        self.eta = eta
        self.sample_ids = sample_ids
        self.pool = f"{pool_fingerprint(sample_ids)} {content}".strip()
        self.world = world
        self.target_batches = target_batches
        self.length_of = length_of
        self.strata = strata
        self.table: ScoreTable | None = None
        self.report: PassReport | None = None
        self.neighbours: np.ndarray | None = None
        self.passes = 0
        self.progress = progress
        self.refuses_parts = refuses_parts
        self._parts_folder = parts_folder
        self.parts = Parts(None)
        self._measurer = Measurer(scoring, seed=seed, eta=eta, world=world, batch_of=batch_of, losses=losses)
        self._standardisation = Standardisation(gate=scoring.gates_convergence)
        self._first_order = scoring.delta_loss == "first_order"

    def score(self, module: nn.Module, *, refresh: bool = False, model_key: str = "") -> ScoreTable:
        """Score the pool or, with ``refresh``, ``refresh_fraction`` of S. Collective; equal on every rank.

        The first pass fixes S and the standardisation constants. A refresh replaces the scores of the samples that
        it saw and renormalises the probabilities over the pool. The mean gradient of ``alignment`` is taken over
        the samples of the pass.

        Args:
            module: the unwrapped model, never a DDP or DeepSpeed engine; it is left as it was.
            refresh: a light pass; needs a full one before it.
            model_key: says which weights ``module`` has; parts of a killed pass are taken up only under the same key.

        Raises:
            UserError: no sample has a finite loss and gradient; the parts folder holds those of another pass.
        """
        started = time.perf_counter()
        assert self.table is not None or not refresh, "a refresh needs a full pass before it"
        indices = self._refreshed() if refresh else self._subsample()
        with self._measurer.on(module):
            self._measure(indices, model_key)
            direction = self._target_direction()
        loss, terms = self._terms(indices, direction)
        finite = np.isfinite(loss) & np.isfinite(terms).all(axis=1)
        if not finite.any():
            raise UserError(
                "no scored sample has a finite loss and gradient, the model has diverged; "
                "lower train.lr or use model.dtype=fp32"
            )
        self._report_not_finite(indices[~finite])
        self._standardisation.fit(terms[finite])
        self.table = self._updated(indices, loss, terms, finite)
        self.report = PassReport(
            self.passes,
            len(indices),
            time.perf_counter() - started,
            bool(self._measurer.one_at_a_time),
            int((~finite).sum()),
        )
        self.passes += 1
        return self.table

    def adopt(self, table: ScoreTable) -> None:
        """Take the table of a pass over the same pool with another model; this model makes no refresh of it."""
        assert len(table) == len(self.sample_ids)
        self.table = table
        self.passes = 1

    def draws(self) -> tuple[np.ndarray, np.ndarray]:
        """Pool indices of S, and the probabilities (sum 1) by which minibatches are drawn from them."""
        assert self.table is not None
        chosen = np.flatnonzero(self.table.selected)
        strata = None if self.strata is None else self.strata[chosen]
        sizes = np.array([len(self.table)]) if self.strata is None else np.bincount(self.strata)
        return chosen, renormalised(self.table.probability[chosen], strata, sizes)

    def discard_parts(self) -> None:
        """Forget the raw numbers and sketches of the last pass, also of one that was made before a resume."""
        self.parts.discard()
        if self._parts_folder is not None:
            shutil.rmtree(self._parts_folder, ignore_errors=True)

    def state_dict(self) -> dict[str, Any]:
        """Table, constants and decisions; without the sketches."""
        return {
            "pool": self.pool,
            "passes": self.passes,
            "measurer": self._measurer.state_dict(),
            "first_order": self._first_order,
            "standardisation": self._standardisation.state_dict(),
            "neighbours": None if self.neighbours is None else torch.from_numpy(self.neighbours.copy()),
            "table": None if self.table is None else self.table.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: it belongs to another pool.
        """
        if state["pool"] != self.pool:
            raise UserError(
                "the checkpoint's scores belong to another pool of samples; "
                "resume with the task.dataset of the run that wrote it"
            )
        self.passes = state["passes"]
        self._measurer.load_state_dict(state["measurer"])
        self._first_order = state["first_order"]
        self._standardisation.load_state_dict(state["standardisation"])
        self.neighbours = None if state["neighbours"] is None else state["neighbours"].numpy().copy()
        self.table = None if state["table"] is None else ScoreTable.from_state_dict(state["table"])

    def _subsample(self) -> np.ndarray:
        """The whole pool, or ``scoring.max_samples`` of it, the same ones in every full pass."""
        size, limit = len(self.sample_ids), self.scoring.max_samples
        if limit is None or limit >= size:
            return np.arange(size)
        return np.sort(np.argsort(philox(self.seed, "subsample").random(size), kind="stable")[:limit])

    def _refreshed(self) -> np.ndarray:
        assert self.table is not None
        members = np.flatnonzero(self.table.selected)
        count = share_of(self.scoring.refresh_fraction, len(members))
        keys = philox(self.seed, "refresh", self.passes).random(len(members))
        return np.sort(members[np.argsort(keys, kind="stable")[:count]])

    def _ordered(self, indices: np.ndarray) -> np.ndarray:
        if self.length_of is None:
            return indices
        return indices[np.argsort(self.length_of(indices), kind="stable")]

    def _measure(self, indices: np.ndarray, model_key: str) -> None:
        """Fill :attr:`parts` on rank 0, from where a killed pass stopped. Collective."""
        size = self.scoring.shard_size
        shards = [self._ordered(indices[start : start + size]) for start in range(0, len(indices), size)]
        folder = self._parts_folder / f"pass-{self.passes:03d}" if self._parts_folder is not None else None
        self.parts = Parts(folder)
        there, batch_size, problem = 0, None, None
        if self.world.is_main:
            try:
                there = self.parts.open(self._fingerprint(indices, model_key), refuse=self.refuses_parts)
                batch_size = self.parts[0].batch_size if there else None
            except UserError as error:
                problem = str(error)
        there, batch_size, problem = self.world.broadcast((there, batch_size, problem))
        if problem is not None:
            raise UserError(problem)
        if batch_size is not None:  # of a killed pass: its batches again, to the bit
            self._measurer.batch_size = batch_size
        done = sum(len(shard) for shard in shards[:there])

        def show(more: int) -> None:
            if self.progress is not None:
                self.progress(done + more, len(indices))

        for shard in shards[there:]:
            rows = self._measurer.measure(shard, exact=not self._first_order, progress=show)
            if rows is not None:
                self.parts.append(rows)
            done += len(shard)

    def _fingerprint(self, indices: np.ndarray, model_key: str) -> dict[str, Any]:
        """What the raw numbers of a pass depend on."""
        kept = ("delta_loss", "convergence", "sketch_dim", "batch_size", "shard_size", "max_length", "include_head")
        settings = self.scoring.model_dump(mode="json", include=set(kept))
        return {
            "pool": self.pool,
            "samples": hashlib.sha256(indices.tobytes()).hexdigest(),
            "model": model_key,
            "seed": self.seed,
            "eta": self.eta,
            **{f"scoring.{key}": settings[key] for key in kept},
        }

    def _target_direction(self) -> Tensor | None:
        if self.scoring.convergence != "target" or self.target_batches is None:
            return None
        return self._measurer.mean_sketch(self.target_batches())

    def _terms(self, indices: np.ndarray, direction: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
        """Losses (n,) and raw terms (n, 3) of the samples at ``indices``, on every rank. Collective."""
        rows = self.world.broadcast(self._rows(direction) if self.world.is_main else None)
        assert rows is not None
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        assert (rows[:, 0] == indices).all()
        loss, terms, rounding = rows[:, 1], rows[:, 2:5], rows[:, 5].max()
        if not self._first_order:
            self._first_order = self._below_rounding(loss, terms, rounding)
            if self._first_order:
                terms[:, 1] = self.eta * terms[:, 0] ** 2
        if self.scoring.convergence == "loss_trend" and self.table is not None:
            seen = self.table.scoring_pass[indices] != NEVER
            terms[:, 2] = np.where(seen, self.table.loss[indices] - loss, 0.0)
        return loss, terms

    def _rows(self, direction: Tensor | None) -> np.ndarray:
        """(n, 6): pool index, loss, norm, loss reduction, convergence, rounding. On rank 0, from its parts.

        The mean is summed up in the pass's order, so that it does not depend on the number of ranks. Convergence is
        zero for ``loss_trend``, which needs no gradient.
        """
        if direction is None and self.scoring.convergence != "loss_trend":
            direction = self._mean_direction()
        found = []
        for part in self.parts:
            aligned = np.zeros(len(part.indices))
            if direction is not None:
                aligned = cosines(torch.from_numpy(part.sketches), direction).numpy()
            rounding = np.full(len(part.indices), part.rounding)
            found.append(np.column_stack([part.indices, part.values, aligned, rounding]))
        return np.concatenate(found)

    def _mean_direction(self) -> Tensor:
        total, count = torch.zeros(self.scoring.sketch_dim, dtype=torch.float64), 0
        for part in self.parts:
            sketches = torch.from_numpy(part.sketches)
            usable = sketches[sketches.isfinite().all(1)].double()
            if self.scoring.takes_unit_mean:
                usable = torch.nn.functional.normalize(usable)
            total += usable.sum(0)
            count += len(usable)
        return total / max(count, 1)

    def _below_rounding(self, loss: np.ndarray, terms: np.ndarray, eps: float) -> bool:
        """Whether a step of ``eta`` changes the losses by no more than the forward's rounding does.

        The difference of two forwards is then noise, and its first order, the same up to O(eta^2), is the better
        number. Decided in the first pass that finds it so, and kept.
        """
        finite = np.isfinite(loss) & np.isfinite(terms[:, 0])
        if not finite.any():
            return False
        spread = (self.eta * terms[finite, 0] ** 2).std()
        noise = NOISE_ROUNDINGS * eps * np.abs(loss[finite]).mean()
        if spread == 0 or spread > noise:
            return False
        if self.world.is_main:
            log.warning(
                "loss reductions by a step of scoring.eta=%g (spread %.1e) are below the rounding of the model's "
                "losses (%.1e); using scoring.delta_loss=first_order",
                self.eta,
                spread,
                noise,
            )
        return True

    def _report_not_finite(self, indices: np.ndarray) -> None:
        if len(indices) == 0:
            return
        first = ", ".join(str(self.sample_ids[i]) for i in indices[:5])
        if self.world.is_main:
            log.warning(
                "%d samples have a loss or gradient that is not finite and get the lowest quality; first ids: %s",
                len(indices),
                first,
            )

    def _count_neighbours(self) -> np.ndarray:
        """How many samples of the pass teach the same as each of the pool, itself included, (N,). Collective."""
        counts = np.ones(len(self.sample_ids), dtype=np.int64)
        if self.world.is_main:
            rows = np.concatenate([part.indices for part in self.parts])
            sketches = np.concatenate([part.sketches for part in self.parts])
            counts[rows] = neighbours(similar_pairs(sketches, self.sampling.similarity, seed=self.seed), len(rows))
        return self.world.broadcast(counts)

    def _updated(self, indices: np.ndarray, loss: np.ndarray, terms: np.ndarray, finite: np.ndarray) -> ScoreTable:
        """The table after this pass; earlier tables stay as they are. Collective."""
        weights = term_weights(self.scoring)
        quality = self._standardisation.z(terms) @ weights
        worst = quality[finite].min()
        first = self.table is None
        table = ScoreTable.empty(len(self.sample_ids)) if self.table is None else self.table.copy()
        if not first:
            worst = min(worst, table.quality.min())
        quality[~finite] = worst
        table.loss[indices] = loss
        table.grad_norm[indices], table.delta_loss[indices], table.convergence[indices] = terms.T
        table.quality[indices] = quality
        table.scoring_pass[indices] = self.passes
        if first:
            rest = table.scoring_pass == NEVER
            mean = terms[finite].mean(axis=0)
            table.loss[rest] = loss[finite].mean()
            table.grad_norm[rest], table.delta_loss[rest], table.convergence[rest] = mean
            table.quality[rest] = quality[finite].mean()  # not that of the mean terms: a gate is not linear
        if first and self.sampling.redundancy:
            self.neighbours = self._count_neighbours()
        worth = table.quality
        if self.neighbours is not None:
            worth = worth - self.sampling.tau * self.sampling.redundancy * np.log(self.neighbours)
        log_p = log_probabilities(worth, self.sampling.tau, self.world, self.strata)
        table.probability = np.exp(log_p)
        if first:
            table.selected = select_subset(len(table), log_p, self.sampling, seed=self.seed, strata=self.strata)
        return table
