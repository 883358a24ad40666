"""Quality scores of the pool: the passes, what is kept between them, and the table that they give (paper 2.1)."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora_scale.common.disk_arrays import blocks, copied, counted, positions, taken
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.random_streams import philox, uniform
from tsqlora_scale.config.schema import SamplingConfig, ScoringConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.sharded import read_parameter
from tsqlora_scale.quality.draws.key_order import smallest
from tsqlora_scale.quality.draws.redundancy import count_similar
from tsqlora_scale.quality.draws.subset import draws_of, share_of
from tsqlora_scale.quality.gradients.folds import Update
from tsqlora_scale.quality.gradients.sketch import cosines
from tsqlora_scale.quality.pool import BatchT, Pool
from tsqlora_scale.quality.scores.equations import Standardisation, term_weights
from tsqlora_scale.quality.scores.measurer import Measurer
from tsqlora_scale.quality.scores.pass_kind import PassKind
from tsqlora_scale.quality.scores.pass_scores import PassScores
from tsqlora_scale.quality.scores.score_parts import Parts, PassPart
from tsqlora_scale.quality.scores.score_table import ScoreTable, check_pool, pool_key
from tsqlora_scale.quality.scores.table_draws import set_draws

log = logging.getLogger("tsqlora_scale")


@dataclass(frozen=True)
class PassReport:
    """What a scoring pass was and cost."""

    scoring_pass: int
    samples: int
    seconds: float
    one_at_a_time: bool
    not_finite: int


class QualityScorer(Generic[BatchT]):
    """Scores a pool, once in full and then by light refreshes.

    Args:
        scoring, sampling: the config sections.
        pool: the samples.
        theta: the linear modules of a model whose parameters are scored, by name (an adapter type's ``theta``).
        world: the ranks. They score disjoint shares and all hold the whole table.
        seed: of the run; sketches, subsamples and the draw of S derive from it.
        eta: step size of the loss reduction.
        stratify: whether the pool's strata each keep their share of the draws.
        model_name: says which base the model has; parts of a killed pass are taken up only under the same name and
            the same trained weights.
        progress: told (samples done, samples of the pass).
        parts_folder: where the numbers of a pass are kept while it runs; None keeps them in memory.
        update: what sketches are of; None: gradients (:class:`.Measurer`).

    Attributes:
        table: the last table; None before the first pass.
        report: what the last pass cost.
        neighbours: samples that teach the same as each, (N,), from the first pass; None without ``redundancy``.
        parts: rank 0's raw numbers and sketches of the last pass, until :meth:`discard_parts`.

    Raises:
        UserError: the disk of TMPDIR has no room, on any rank.
    """

    def __init__(
        self,
        scoring: ScoringConfig,
        sampling: SamplingConfig,
        *,
        pool: Pool[BatchT],
        theta: Callable[[nn.Module], dict[str, nn.Linear]],
        world: World,
        seed: int,
        eta: float,
        stratify: bool = False,
        model_name: str = "",
        progress: Callable[[int, int], None] | None = None,
        parts_folder: Path | None = None,
        update: Update | None = None,
    ) -> None:
        assert len(pool) > 0, "an empty pool"
        self.scoring = scoring
        self.sampling = sampling
        self.seed = seed
        self.eta = eta
        self.pool = pool
        self.pool_key = pool_key(pool)
        self.world = world
        with world.together():  # a pool's columns may not find room on one rank alone
            self._lengths = pool.lengths()
            self.strata = pool.strata() if stratify else None
        self.table: ScoreTable | None = None
        self.report: PassReport | None = None
        self.neighbours: np.ndarray | None = None
        self.passes = 0
        self.progress = progress
        self._model_name = model_name
        self._parts_folder = parts_folder
        self.parts = Parts(None)
        self._measurer = Measurer(scoring, pool=pool, theta=theta, seed=seed, eta=eta, world=world, update=update)
        self._standardisation = Standardisation(gate=scoring.gates_convergence)
        self._kind = PassKind(scoring, self._measurer, world=world)

    def score(self, module: nn.Module, *, refresh: bool = False) -> ScoreTable:
        """Score the pool or, with ``refresh``, ``refresh_fraction`` of S. Collective; equal on every rank.

        The first pass fixes S and the standardisation constants. A refresh replaces the scores of the samples that
        it saw and renormalises the probabilities over the pool. The mean gradient of ``alignment`` is taken over
        the samples of the pass.

        Args:
            module: the unwrapped model, never a DDP or DeepSpeed engine; it is left as it was.
            refresh: a light pass; needs a full one before it.

        Raises:
            UserError: no sample has a finite loss and gradient; the disk of TMPDIR has no room for the columns of a
                large pool, on any rank.
        """
        started = time.perf_counter()
        assert self.table is not None or not refresh, "a refresh needs a full pass before it"
        with self.world.together():
            indices = self._refreshed() if refresh else self._subsample()
            table = ScoreTable.empty(len(self.pool)) if self.table is None else self.table.copy()
        model_key = self._model_key(module)
        with self._measurer.on(module):
            self._measure(indices, model_key)
        scores = PassScores(table, self.passes)
        self._collect(scores, indices)
        with self.world.together():
            not_finite = self._rate(scores)
        self._choose(table)
        self.table = table
        self.report = PassReport(
            self.passes,
            len(indices),
            time.perf_counter() - started,
            bool(self._measurer.one_at_a_time),
            not_finite,
        )
        self.passes += 1
        return self.table

    def adopt(self, table: ScoreTable) -> None:
        """Take the table of a pass over the same pool with another model; this model makes no refresh of it."""
        assert len(table) == len(self.pool)
        self.table = table
        self.passes = 1

    def draws(self) -> tuple[np.ndarray, np.ndarray]:
        """Pool indices of S, and the probabilities (sum 1) by which minibatches are drawn from them."""
        assert self.table is not None
        return draws_of(self.table, self.strata)

    def discard_parts(self) -> None:
        """Forget the raw numbers and sketches of the last pass, also of one that was made before a resume."""
        self.parts.discard()
        if self._parts_folder is not None:
            shutil.rmtree(self._parts_folder, ignore_errors=True)

    @property
    def measured(self) -> dict[str, str | None]:
        """What passes measure of a sample, ``kind`` (:data:`.score_parts.Kind`; None before the first), and the
        ``reason`` where the config has left it open."""
        return self._kind.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Table, constants and decisions; without the sketches."""
        return {
            "pool": self.pool_key,
            "passes": self.passes,
            "measurer": self._measurer.state_dict(),
            "pass_kind": self._kind.state_dict(),
            "standardisation": self._standardisation.state_dict(),
            "neighbours": None if self.neighbours is None else torch.from_numpy(self.neighbours),
            "table": None if self.table is None else self.table.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: it belongs to another pool.
        """
        check_pool(state["pool"], self.pool_key)
        self.passes = state["passes"]
        self._measurer.load_state_dict(state["measurer"])
        if "pass_kind" in state:
            self._kind.load_state_dict(state["pass_kind"])
        else:  # written before 0.3: it was decided after the pass
            kind = "first_order" if state["first_order"] else "exact"
            self._kind.load_state_dict({"kind": kind, "reason": ""})
        self._standardisation.load_state_dict(state["standardisation"])
        self.neighbours = None if state["neighbours"] is None else state["neighbours"].numpy().copy()
        self.table = None if state["table"] is None else ScoreTable.from_state_dict(state["table"])

    def _subsample(self) -> np.ndarray:
        """The whole pool, or ``scoring.max_samples`` of it, the same ones in every full pass."""
        size, limit = len(self.pool), self.scoring.max_samples
        if limit is None or limit >= size:
            return counted(size)
        return positions(smallest(uniform(philox(self.seed, "subsample"), size), limit))

    def _refreshed(self) -> np.ndarray:
        assert self.table is not None
        members = positions(self.table.selected)
        count = share_of(self.scoring.refresh_fraction, len(members))
        keys = uniform(philox(self.seed, "refresh", self.passes), len(members))
        return taken(members, smallest(keys, count))

    def _ordered(self, indices: np.ndarray) -> np.ndarray:
        return indices[np.argsort(self._lengths[indices], kind="stable")]

    def _shards(self, indices: np.ndarray, first: int = 0) -> Iterator[np.ndarray]:
        """What is measured together, from the ``first`` on."""
        size = self.scoring.shard_size
        return (self._ordered(indices[start : start + size]) for start in range(first * size, len(indices), size))

    def _measure(self, indices: np.ndarray, model_key: str) -> None:
        """Fill :attr:`parts` on rank 0, from where a killed pass stopped. Collective."""
        folder = self._parts_folder / f"pass-{self.passes:03d}" if self._parts_folder is not None else None
        self.parts = Parts(folder)
        kept, decided = 0, None
        with self.world.together():
            if self.world.is_main:
                kept = self.parts.open(self._fingerprint(indices, model_key))
                if kept:
                    part = self.parts[0]
                    decided = (part.batch_size, part.one_at_a_time, part.kind, part.reason)
        kept, decided = self.world.broadcast((kept, decided))
        if decided is not None:
            self._kind.resume(decided)
        done = min(kept * self.scoring.shard_size, len(indices))

        def show(more: int) -> None:
            if self.progress is not None:
                self.progress(done + more, len(indices))

        for shard in self._shards(indices, kept):
            rows = self._kind.measure(shard, show)
            if rows is not None:
                self.parts.append(rows)
            done += len(shard)

    def _fingerprint(self, indices: np.ndarray, model_key: str) -> dict[str, Any]:
        """What the raw numbers of a pass depend on."""
        keys = ("delta_loss", "convergence", "sketch_dim", "batch_size", "shard_size", "max_length", "include_head")
        settings = self.scoring.model_dump(mode="json", include=set(keys))
        return {
            "pool": self.pool_key,
            "samples": hashlib.sha256(indices.data).hexdigest(),
            "model": model_key,
            "seed": self.seed,
            "eta": self.eta,
            "measured": self._kind.asked,
            "updates": self._measurer.update is not None,
            **{f"scoring.{key}": settings[key] for key in keys},
        }

    def _model_key(self, module: nn.Module) -> str:
        """Says which weights the model has: the base by its name, what is trained by a digest. Collective."""
        if self._parts_folder is None:
            return ""
        digest = hashlib.sha256()
        for name, param in sorted(module.named_parameters()):
            if param.requires_grad:
                digest.update(name.encode())
                digest.update(read_parameter(param).float().cpu().numpy().tobytes())
        return f"{self._model_name} {digest.hexdigest()}"

    def _collect(self, scores: PassScores, indices: np.ndarray) -> None:
        """Enter the raw numbers of the samples at ``indices``, on every rank. Collective.

        The parts go from rank 0 to the others one at a time. The mean of the sketches is summed up in the pass's
        order, so that it does not depend on the number of ranks. Convergence is zero for ``loss_trend``, which needs
        no gradient.
        """
        aligns = self.world.is_main and self.scoring.convergence == "alignment"
        direction = self._mean_direction() if aligns else None
        size = self.scoring.shard_size
        for number in range(-(-len(indices) // size)):
            rows = torch.empty(min(size, len(indices) - number * size), 5, dtype=torch.float64)
            if self.world.is_main:
                found = self._rows(self.parts[number], direction)
                assert found.shape == rows.shape, "a part of another shard"
                rows = torch.from_numpy(found)
            received = self.world.broadcast_tensor(rows).numpy()
            scores.enter(received[:, 0].astype(np.int64), received[:, 1:5])
        assert len(scores) == len(indices), "parts of other samples"

    @staticmethod
    def _rows(part: PassPart, direction: Tensor | None) -> np.ndarray:
        """(n, 5): pool index, loss, norm, loss reduction, convergence."""
        aligned = np.zeros(len(part.indices))
        if direction is not None:
            aligned = cosines(torch.from_numpy(part.sketches), direction).numpy()
        return np.column_stack([part.indices, part.values, aligned])

    def _rate(self, scores: PassScores) -> int:
        """Qualities by the terms, in place; how many samples of the pass are not finite."""
        if self.scoring.convergence == "loss_trend" and self.table is not None:
            scores.take_loss_trend(self.table)
        finite = scores.finite(self._kind.columns)
        if not finite.any():
            raise UserError(
                "no scored sample has a finite loss and gradient, the model has diverged; "
                "lower train.lr or use model.dtype=fp32"
            )
        not_finite = scores.warn_of_not_finite(finite, self.pool.sample_ids, says=self.world.is_main)
        scores.fit(self._standardisation, finite)
        scores.rate(self._standardisation, term_weights(self.scoring), finite, before=self.table)
        if self.table is None:
            scores.give_rest_the_mean(finite)
        return not_finite

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

    def _count_neighbours(self) -> np.ndarray:
        """How many samples of the pass teach the same as each of the pool, itself included, (N,). Collective."""
        counts = np.ones(len(self.pool), dtype=np.int64)
        if self.world.is_main:
            rows = np.concatenate([part.indices for part in self.parts])
            sketches = np.concatenate([part.sketches for part in self.parts])
            counts[rows] = count_similar(sketches, self.sampling.similarity, seed=self.seed)
        return self.world.broadcast(counts)

    def _choose(self, table: ScoreTable) -> None:
        """Probabilities by the qualities, in place; in the first pass also S. Collective."""
        first = self.table is None
        if first and self.sampling.redundancy:
            self.neighbours = self._count_neighbours()
        discounted = table.quality
        if self.neighbours is not None:
            with self.world.together():
                discounted = copied(discounted)
            for block in blocks(len(discounted)):
                discounted[block] -= self.sampling.tau * self.sampling.redundancy * np.log(self.neighbours[block])
        set_draws(
            table,
            discounted,
            self.sampling,
            world=self.world,
            seed=self.seed,
            strata=self.strata,
            always=self.pool.query_rows if first else None,
        )
