"""The raw numbers of one pass in the columns of a table, and what is computed over them, block by block."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from tsqlora_scale.common.disk_arrays import blocks, new_array, taken
from tsqlora_scale.quality.scores.equations import Standardisation, mean_of, quality
from tsqlora_scale.quality.scores.score_table import NEVER, ScoreTable

log = logging.getLogger("tsqlora_scale")

#: the three raw terms of Eq. 1, as the table calls them
TERMS = ("grad_norm", "delta_loss", "convergence")


class PassScores:
    """The samples that a pass has scored: those whose ``scoring_pass`` is its number.

    Args:
        table: a table of the pass's own, whose other samples hold what earlier passes found.
        number: of the pass.
    """

    def __init__(self, table: ScoreTable, number: int) -> None:
        self.table = table
        self.number = number

    def enter(self, places: np.ndarray, values: np.ndarray) -> None:
        """Enter loss, gradient norm, loss reduction and convergence (n, 4) of the samples at ``places`` (n,)."""
        for column, name in enumerate(("loss", *TERMS)):
            getattr(self.table, name)[places] = values[:, column]
        self.table.scoring_pass[places] = self.number

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Every block of the pool that has samples of the pass, and where in it they are, ascending."""
        for block in blocks(len(self.table)):
            inside = np.flatnonzero(self.table.scoring_pass[block] == self.number)
            if len(inside):
                yield block, inside

    def terms(self, block: slice, inside: np.ndarray) -> np.ndarray:
        """Their raw terms, (n, 3)."""
        return np.column_stack([getattr(self.table, name)[block][inside] for name in TERMS])

    def __len__(self) -> int:
        return sum(len(inside) for _, inside in self.blocks())

    def take_loss_trend(self, before: ScoreTable) -> None:
        """Put the fall of the loss since the table ``before`` in the place of the convergence term."""
        for block, inside in self.blocks():
            seen = before.scoring_pass[block][inside] != NEVER
            fall = before.loss[block][inside] - self.table.loss[block][inside]
            self.table.convergence[block][inside] = np.where(seen, fall, 0.0)

    def finite(self, columns: tuple[str, ...] = ("loss", *TERMS)) -> np.ndarray:
        """Which samples of the pool the pass has scored with finite numbers in all ``columns``, (N,) bool."""
        found = new_array(len(self.table), bool)
        for block in blocks(len(self.table)):
            found[block] = self.table.scoring_pass[block] == self.number
            for name in columns:
                found[block] &= np.isfinite(getattr(self.table, name)[block])
        return found

    def not_finite(self, finite: np.ndarray, most: int) -> tuple[int, list[int]]:
        """Number of the pass's samples that are not, and the first ``most``."""
        count = 0
        first: list[int] = []
        for block, inside in self.blocks():
            bad = inside[~finite[block][inside]]
            count += len(bad)
            first += (block.start + bad[: most - len(first)]).tolist()
        return count, first

    def fit(self, standardisation: Standardisation, finite: np.ndarray) -> None:
        """Let ``standardisation`` take the constants that it lacks from the ``finite`` samples."""
        standardisation.fit(lambda: self._finite_terms(finite))

    def rate(
        self, standardisation: Standardisation, weights: np.ndarray, finite: np.ndarray, *, before: ScoreTable | None
    ) -> None:
        """Q of the pass's samples (Eq. 1); those that are not finite get the lowest of all.

        Args:
            before: the table of the earlier passes.
        """
        qualities = self.table.quality
        worst = np.inf if before is None else before.quality.min()
        for block, inside in self.blocks():
            qualities[block][inside] = quality(self.terms(block, inside), standardisation, weights)
            worst = np.minimum(worst, qualities[block][finite[block]].min(initial=np.inf))
        for block, inside in self.blocks():
            qualities[block][inside[~finite[block][inside]]] = worst

    def warn_of_not_finite(self, finite: np.ndarray, sample_ids: Sequence[str], *, says: bool) -> int:
        """How many of the pass's samples are not ``finite``; warned of, if this rank ``says`` so."""
        count, first = self.not_finite(finite, 5)
        if count and says:
            log.warning(
                "%d samples have a loss or gradient that is not finite and get the lowest quality; first ids: %s",
                count,
                ", ".join(str(sample_ids[i]) for i in first),
            )
        return count

    def give_rest_the_mean(self, finite: np.ndarray) -> None:
        """Let samples that no pass has scored carry the means of the ``finite`` ones.

        Their quality is the mean one, not that of the mean terms: a gate is not linear.
        """
        table = self.table
        means = dict(zip(TERMS, mean_of(self._finite_terms(finite)), strict=True))
        means |= {name: taken(getattr(table, name), finite).mean() for name in ("loss", "quality")}
        for block in blocks(len(table)):
            rest = table.scoring_pass[block] == NEVER
            for name, mean in means.items():
                getattr(table, name)[block][rest] = mean

    def _finite_terms(self, finite: np.ndarray) -> Iterator[np.ndarray]:
        return (self.terms(block, inside[finite[block][inside]]) for block, inside in self.blocks())
