"""Rows of a pool against those of a query, from their features: both looks, and what they make of any other row."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tsqlora_scale.common.disk_arrays import filled
from tsqlora_scale.quality.query.density_ratio import DensityRatio, Standing, stand
from tsqlora_scale.quality.query.fits import probability
from tsqlora_scale.quality.query.looks import Shape
from tsqlora_scale.quality.query.mixture import Mixture
from tsqlora_scale.quality.query.terms import LabelTerms, NumberTerms, Terms, fit_terms


@dataclass(frozen=True)
class RowRating:
    """What is known of rows by a query.

    Attributes:
        terms: of the first look, and ``ratio``, what they come to.
        mixture: the second look; None where the answers are texts, or the query does not stand out of the pool.
        standing: of the query to the pool.
        of_pool, of_query: values of :attr:`names`, (N, m) and (n, m), no row by what has seen it.
    """

    shape: Shape
    terms: Terms
    ratio: DensityRatio
    mixture: Mixture | None
    standing: Standing
    of_pool: np.ndarray
    of_query: np.ndarray

    @classmethod
    def fit(cls, shape: Shape, pool: np.ndarray, query: np.ndarray, *, seed: int, classes: int = 0) -> RowRating:
        """From numbers of the pool's rows (N, ...) and of the query's (n, ...), as :class:`.FeatureLook` gives them.

        Args:
            classes: how many there are at least; rows that are not among these may have others.
        """
        terms, of_pool, of_query = fit_terms(shape, pool, query, seed=seed, classes=classes)
        ratio, standing = stand(of_pool, of_query, rising=terms.rising, seed=seed)
        first = cls(shape, terms, ratio, None, standing, of_pool, of_query)
        if not standing.is_evident or not isinstance(terms, LabelTerms | NumberTerms):
            return first
        (features, answers), (wanted_features, wanted) = (shape.split(side) for side in (pool, query))
        known, count = (answers.astype(np.float64), wanted.astype(np.float64)), None
        if shape.kind == "classes":
            known = (answers.astype(np.int64), wanted.astype(np.int64))
            count = max(classes, *(int(side.max()) + 1 for side in known))
        mixture, more_of_pool, more_of_query = Mixture.fit(
            terms.likeness,
            (features, wanted_features),
            known,
            (of_pool, of_query),
            first.wanted(of_pool),
            classes=count,
        )
        return replace(
            first,
            mixture=mixture,
            standing=replace(standing, share=mixture.share, most=max(standing.most, mixture.share), by_mixture=True),
            of_pool=np.column_stack([of_pool, more_of_pool]),
            of_query=np.column_stack([of_query, more_of_query]),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the m terms of both looks."""
        return self.terms.names + (() if self.mixture is None else self.mixture.names)

    def values(self, numbers: np.ndarray) -> np.ndarray:
        """Of rows that no model has seen, (n, m), from their numbers (n, ...)."""
        features, last = self.shape.split(numbers)
        first = self.terms.values(features, last)
        if self.mixture is None:
            return first
        return np.column_stack([first, self.mixture.values(features, last, first[:, 2])])

    def log_ratio(self, values: np.ndarray) -> np.ndarray:
        """The higher, the surer rows are wanted, (n,): log odds by the second look, or ``log q / p`` by the first."""
        first = len(self.terms.names)
        if self.mixture is None:
            return self.ratio.log_ratio(values[:, :first])
        return self.mixture.log_odds(values[:, 0].astype(np.float64), values[:, first:].astype(np.float64))

    def wanted(self, values: np.ndarray) -> np.ndarray:
        """The probability that rows are wanted, (n,): of log odds, or ``min(1, pi q / p)``; 1 without evidence."""
        if not self.standing.is_evident:
            return filled(len(values), np.float64, 1.0)
        ratio = self.log_ratio(values)
        if self.mixture is None:
            return np.asarray(np.exp(np.minimum(ratio + np.log(max(self.standing.share, 1e-3)), 0.0)))
        return probability(ratio)

    def agrees(self, values: np.ndarray) -> np.ndarray | None:
        """Whether the pool, by the text, expects the answer that rows have, (n,) bool; None without a second look."""
        return None if self.mixture is None else np.asarray(values[:, -1] > 0)
