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

#: Rows of a pool without which there is nothing to fit.
LEAST = 2


@dataclass(frozen=True)
class RowRating:
    """What is known of rows by a query.

    Attributes:
        terms: of the first look, and ``ratio``, what they come to.
        mixture: the second look; None where the answers are texts, or the query does not stand out of the pool.
        standing: of the query to the pool.
        of_pool, of_query: values of :attr:`names`, (N, m) and (n, m), no row by what has seen it; but what the pool's
            rows that are copies of the query's are to the query, its models know from the latter.
    """

    shape: Shape
    terms: Terms
    ratio: DensityRatio
    mixture: Mixture | None
    standing: Standing
    of_pool: np.ndarray
    of_query: np.ndarray

    @classmethod
    def fit(
        cls,
        shape: Shape,
        pool: np.ndarray,
        query: np.ndarray,
        *,
        copies: np.ndarray | None = None,
        seed: int,
        classes: int = 0,
    ) -> RowRating:
        """From numbers of the pool's rows (N, ...) and of the query's (n, ...), as :class:`.FeatureLook` gives them.

        Args:
            copies: see :func:`.fit_terms`.
            classes: how many there are at least; rows that are not among these may have others.
        """
        fitted = np.ones(len(pool), dtype=bool)
        if copies is not None:
            # copies of the query's rows would teach the pool's models what the query's answers are
            fitted = ~np.isin(copies[: len(pool)], copies[len(pool) :])
        if copies is None or fitted.all():
            return cls._fit(shape, pool, query, copies=copies, seed=seed, classes=classes)
        if fitted.sum() < LEAST:  # there is nothing else
            found = cls._fit(shape, pool, query, copies=copies, seed=seed, classes=classes)
            first, standing = len(found.terms.names), Standing(share=1.0, most=1.0, area=0.5, evidence=0.0)
            sides = (side[:, :first] for side in (found.of_pool, found.of_query))
            return cls(shape, found.terms, found.ratio, None, standing, *sides)
        found = cls._fit(
            shape, pool[fitted], query, copies=copies[np.append(fitted, np.ones(len(query), dtype=bool))], seed=seed,
            classes=classes,
        )  # fmt: skip
        of_pool = np.empty((len(pool), found.of_pool.shape[1]), dtype=found.of_pool.dtype)
        of_pool[fitted], of_pool[~fitted] = found.of_pool, found.values(pool[~fitted].astype(np.float64))
        part, standing, likely = float(fitted.mean()), found.standing, float(found.wanted(of_pool[~fitted]).mean())
        share, most = (part * value + (1 - part) * likely for value in (standing.share, standing.most))
        return replace(found, standing=replace(standing, share=share, most=most), of_pool=of_pool)

    @classmethod
    def _fit(
        cls,
        shape: Shape,
        pool: np.ndarray,
        query: np.ndarray,
        *,
        copies: np.ndarray | None,
        seed: int,
        classes: int,
    ) -> RowRating:
        """Where no row of the pool is one of the query's."""
        terms, of_pool, of_query = fit_terms(shape, pool, query, copies=copies, seed=seed, classes=classes)
        ratio, standing = stand(of_pool, of_query, rising=terms.rising, copies=copies, seed=seed)
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
            copies=copies,
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
