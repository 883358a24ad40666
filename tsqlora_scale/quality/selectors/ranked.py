"""What selectors have in common that rate the pool once and train on the best."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from tsqlora_scale.common.disk_arrays import blocks, copied, counts, filled, positions
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.random_streams import philox
from tsqlora_scale.quality.draws.key_order import largest
from tsqlora_scale.quality.draws.subset import quotas, share_of
from tsqlora_scale.quality.scores.score_table import ScoreTable
from tsqlora_scale.quality.selectors.full import FullSelector
from tsqlora_scale.quality.selectors.selector import SelectorContext


@dataclass(frozen=True)
class Rating:
    """What a selector thinks of the pool. The same on every rank.

    Attributes:
        quality: the higher the better, (N,) float64, finite; the query's rows at the end count, too.
        terms: what it was made of, by name, (N,) float64 each; they stand in the score files.
        keep: samples worth training on, for ``sampling.keep_fraction: auto``; None: all.
        shares: of the strata in S, up to a constant; None: as large as the pool has them if the config
            ``chooses_within_labels``, else whatever they are among the best.
        strata: (N,) numbers from 0 that ``shares`` are of; None: the pool's own.
        weights: by which samples of S are drawn, (N,), up to a constant; None: evenly.
        findings: what is worth a line in the result.
    """

    quality: np.ndarray
    terms: dict[str, np.ndarray] = field(default_factory=dict)
    keep: int | None = None
    shares: np.ndarray | None = None
    strata: np.ndarray | None = None
    weights: np.ndarray | None = None
    findings: dict[str, Any] = field(default_factory=dict)


class RankedSelector(FullSelector):
    """Rates the pool once, keeps the best ``sampling.keep_fraction`` of it, and draws from these.

    Until then it draws evenly. The rows of ``task.query`` that are trained on belong to S, whatever they are.

    A selector of one's own derives from this and says what it thinks in :meth:`rate`.

    Attributes:
        findings: what the rating has found, for the result.
    """

    def __init__(self, context: SelectorContext) -> None:
        self._table: ScoreTable | None = None
        self._scored_at: int | None = None
        self._of_losses: np.ndarray | None = None
        self.findings: dict[str, Any] = {}
        super().__init__(context)

    def rate(self, module: nn.Module) -> Rating:
        """What the unwrapped ``module`` shows of the pool. A collective."""
        raise NotImplementedError

    @property
    def table(self) -> ScoreTable | None:
        """The ratings; None before they are made."""
        return self._table

    def due(self, step: int) -> bool:
        """Once, at the plan's step."""
        return self._table is None and self.context.scoring_step is not None and step >= self.context.scoring_step

    def score(self, module: nn.Module, step: int) -> None:
        """Rate the pool, and choose S."""
        rating = self.rate(module)
        world = self.context.world
        with world.together():
            assert len(rating.quality) == len(self.pool)
            if not all(np.isfinite(rating.quality[block]).all() for block in blocks(len(self.pool))):
                raise UserError(
                    f"sampling.selector={self.config.sampling.selector!r}: a rating is not finite; the model has "
                    "diverged, or computes in too coarse a type: use model.dtype=fp32"
                )
            self._table = self._chosen(rating)
        self.findings = rating.findings
        self._draw_from(step)

    def weights(self, rows: np.ndarray) -> np.ndarray | None:
        """See :meth:`_loss_weights`; none where samples of S are all alike."""
        return None if self._of_losses is None else self._of_losses[rows]

    def state_dict(self) -> dict[str, Any]:
        """The ratings, and what the draws depend on."""
        table = None if self._table is None else self._table.state_dict()
        ranked = {"table": table, "scored_at": self._scored_at, "query": self._query_digest()}
        return {**super().state_dict(), "ranked": ranked, "findings": self.findings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~tsqlora_scale.quality.selectors.selector.Selector`."""
        ranked = state["ranked"]
        if ranked["query"] != self._query_digest():
            raise UserError(
                "the checkpoint's choice was made by another task.query; resume with the file of the run that wrote it"
            )
        if ranked["table"] is not None:
            with self.context.world.together():
                self._table = ScoreTable.from_state_dict(ranked["table"])
            self.findings = state["findings"]
            self._draw_from(ranked["scored_at"])
        super().load_state_dict(state)

    @property
    def choices(self) -> int:
        """How many samples there are to choose among: all but the query's own, which stand at the pool's end."""
        return len(self.pool) - self.pool.query_rows

    @property
    def places(self) -> int:
        """How many of them are chosen as ``sampling.keep_fraction`` says; all for ``auto``."""
        return share_of(self.config.sampling.most_kept, self.choices)

    def _query_digest(self) -> str:
        return "" if self.pool.query is None else self.pool.query.digest()

    def _chosen(self, rating: Rating) -> ScoreTable:
        """The table of a rating, with S in it."""
        size, rest = len(self.pool), slice(0, self.choices)
        count = self.places
        if self.config.sampling.keep_fraction == "auto":
            count = rating.keep or self.choices
        strata, quota = None, np.array([min(count, self.choices)])
        if rating.shares is not None or self.config.chooses_within_labels:
            strata = self.pool.strata() if rating.strata is None else rating.strata
        if strata is not None:
            strata = strata[rest]
            quota = quota_of(counts(strata), int(quota[0]), rating.shares)
        selected = filled(size, bool, True)
        # many may be alike, as all that were not looked at, and their order in the file says nothing
        ties = philox(self.config.run.seed, "ties")
        selected[rest] = largest(copied(rating.quality[rest]), quota, strata, ties=ties)
        self._warn_of_lost_classes(positions(selected))
        table = ScoreTable.empty(size)
        table.quality, table.selected, table.terms = rating.quality, selected, rating.terms
        table.scoring_pass[:] = 0
        table.probability = filled(size, np.float64, 1.0) if rating.weights is None else copied(rating.weights)
        for block in blocks(size):
            table.probability[block] *= selected[block]
        table.probability /= table.probability.sum()
        return table

    def _draw_from(self, step: int) -> None:
        """Draw from S from ``step`` on. A collective."""
        assert self._table is not None
        self._scored_at = step
        with self.context.world.together():
            rows = positions(self._table.selected)
            weights = self._table.probability[rows]
            are_alike = bool(weights.min() == weights.max())
            self._of_losses = None if are_alike else self._loss_weights(rows, weights)
            self._sampler = self._make_sampler(rows, None if are_alike else self._drawn_by(weights), start=step)


def quota_of(sizes: np.ndarray, total: int, shares: np.ndarray | None) -> np.ndarray:
    """Places of strata of ``sizes`` among ``total``: by ``shares``, or by their sizes; none more than it has."""
    if shares is None:
        return quotas(sizes, total)
    exact, free, left = np.zeros(len(sizes)), np.ones(len(sizes), dtype=bool), float(total)
    while free.any():  # what a stratum that is full cannot take goes to the others
        wanted = np.where(free, shares[: len(sizes)], 0.0)
        wanted = wanted if wanted.any() else free.astype(np.float64)
        exact[free] = (left * wanted / wanted.sum())[free]
        full = free & (exact >= sizes)
        if not full.any():
            break
        exact[full] = sizes[full]
        left -= float(sizes[full].sum())
        free &= ~full
    given = np.floor(exact + 1e-9).astype(np.int64)
    rest = np.argsort(given - exact, kind="stable")[: total - int(given.sum())]
    given[rest] += 1  # to the largest remainders
    return given
