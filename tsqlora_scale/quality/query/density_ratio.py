"""From terms to one number: how much likelier a row is under the wanted task than in the pool; how many rows are so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tsqlora_scale.quality.query.fits import folds_of, logistic, sides

#: Ridge of the regression on standardised terms, beside the mean loss.
RIDGE = 1e-2
#: Parts of both sides for the question whether they differ.
FOLDS = 5
#: Standard errors by which the query's rows must stand out of the pool before anything is left out.
EVIDENCE = 3.0


@dataclass(frozen=True)
class DensityRatio:
    """Logistic regression of the query's rows against the pool's, both sides counting alike.

    Attributes:
        coefficients: of the standardised terms, (m,).
        intercept: of the same.
        means, deviations: by which terms are standardised, (m,) each.
    """

    coefficients: np.ndarray
    intercept: float
    means: np.ndarray
    deviations: np.ndarray

    @classmethod
    def fit(cls, of_pool: np.ndarray, of_query: np.ndarray, *, rising: Sequence[bool]) -> DensityRatio:
        """From the terms of the pool's rows (N, m) and of the query's (n, m), these by models that have not seen them.

        Args:
            rising: of the terms, (m,), whether more of it cannot make a row less wanted. With few rows of the query a
                coefficient may come out below 0 all the same; the term is then left out.
        """
        both = np.concatenate([of_pool, of_query]).astype(np.float64)
        means, deviations = both.mean(0), both.std(0) + 1e-12
        x = torch.from_numpy((both - means) / deviations)
        y = torch.cat([torch.zeros(len(of_pool)), torch.ones(len(of_query))]).double()
        weights = torch.where(y > 0, 0.5 / len(of_query), 0.5 / len(of_pool)).double()
        used = list(range(x.shape[1]))
        coefficients = np.zeros(x.shape[1])
        while True:
            slopes, level = logistic(x[:, used], y, weights, RIDGE)
            against = [place for place, term in enumerate(used) if rising[term] and slopes[place] < 0]
            if not against:
                break
            used.pop(min(against, key=lambda place: float(slopes[place])))
        coefficients[used] = slopes.numpy()
        return cls(coefficients, float(level), means, deviations)

    def log_ratio(self, terms: np.ndarray) -> np.ndarray:
        """``log q / p`` up to the fit, (n,), of terms (n, m)."""
        standardised = (terms.astype(np.float64) - self.means) / self.deviations
        ratio: np.ndarray = standardised @ self.coefficients + self.intercept
        return ratio


def separation(of_pool: np.ndarray, of_query: np.ndarray) -> tuple[float, float]:
    """How well the query's rows stand out: the probability that one has a higher ratio than one of the pool (the area
    under the ROC curve), and by how many of its standard errors that exceeds one half (Mann and Whitney)."""
    order = np.sort(of_pool)
    below = np.searchsorted(order, of_query, "left") + np.searchsorted(order, of_query, "right")
    area = float(below.mean() / (2 * len(of_pool)))
    return area, (area - 0.5) / _level_error(len(of_pool), len(of_query))


def held_out_separation(
    of_pool: np.ndarray,
    of_query: np.ndarray,
    *,
    rising: Sequence[bool],
    copies: np.ndarray | None = None,
    seed: int,
) -> tuple[float, float]:
    """The same of terms (N, m) and (n, m), each row's ratio by a regression that has not seen it: with few rows of the
    query the coefficients, too, can be those of chance (of six, a pool that is as the query stood out in three of ten).

    Means over :data:`FOLDS` folds; an area of one half where there are too few rows to fold.

    Args:
        copies: see :func:`.fit_terms`. A row and its copies say no more than the row: they count once.
    """
    count = min(FOLDS, len(of_pool), len(of_query))
    if count < 2:
        return 0.5, 0.0
    pool_folds = folds_of(None, len(of_pool), count, seed=seed, purpose="evidence folds, pool")
    query_folds = folds_of(None, len(of_query), count, seed=seed, purpose="evidence folds, query")
    areas = []
    for fold in range(count):
        inside = DensityRatio.fit(of_pool[pool_folds != fold], of_query[query_folds != fold], rising=rising)
        outside = (inside.log_ratio(rows) for rows in (of_pool[pool_folds == fold], of_query[query_folds == fold]))
        areas.append(separation(*outside)[0])
    area = float(np.mean(areas))
    groups = zip(sides(copies, len(of_pool)), (of_pool, of_query), strict=True)
    counts = [len(rows) if own is None else len(np.unique(own)) for own, rows in groups]
    return area, (area - 0.5) / _level_error(*counts)


def _level_error(pool: int, query: int) -> float:
    """Standard error of the area, were there no difference."""
    return math.sqrt((pool + query + 1) / (12 * pool * query))


@dataclass(frozen=True)
class Standing:
    """How a query stands to a pool.

    Attributes:
        share: estimated share of the pool (without the query's rows) that is as the query is.
        most: its upper bound.
        area: probability that a row of the query has a higher ratio than one of the pool.
        evidence: standard errors by which that exceeds one half.
        by_mixture: whether the share is that of a second look (:class:`.Mixture`).
    """

    share: float
    most: float
    area: float
    evidence: float
    by_mixture: bool = False

    @property
    def is_evident(self) -> bool:
        """Whether the query stands out of the pool at all."""
        return self.evidence > EVIDENCE


def stand(
    of_pool: np.ndarray,
    of_query: np.ndarray,
    *,
    rising: Sequence[bool],
    copies: np.ndarray | None = None,
    seed: int,
) -> tuple[DensityRatio, Standing]:
    """The regression of terms (N, m) and (n, m), and what it says of the two; ``copies`` as :func:`.fit_terms`."""
    ratio = DensityRatio.fit(of_pool, of_query, rising=rising)
    area, evidence = held_out_separation(of_pool, of_query, rising=rising, copies=copies, seed=seed)
    share, most = wanted_share(ratio.log_ratio(of_pool), ratio.log_ratio(of_query))
    return ratio, Standing(share, most, area, evidence)


def wanted_share(of_pool: np.ndarray, of_query: np.ndarray) -> tuple[float, float]:
    """The share of the pool that is as the query is: an estimate, and an upper bound at about 90 %.

    If a share ``pi`` of the pool is distributed as the query, then above every threshold the pool has at least ``pi``
    times what the query has: ``pi <= P(c) / Q(c)``. The threshold is the one where this ratio, with the uncertainty of
    both counts, is least (Garg et al., *Mixture Proportion Estimation and PU Learning*, NeurIPS 2021, Algorithm 1).

    Args:
        of_pool: log ratios of the pool's rows, (N,).
        of_query: of the query's, (n,), by models that have not seen them.
    """
    thresholds = np.sort(of_query)
    above_q = 1 - np.arange(len(thresholds)) / len(thresholds)
    above_p = 1 - np.searchsorted(np.sort(of_pool), thresholds, "left") / len(of_pool)
    margin = math.sqrt(math.log(4 / 0.1) / 2 / len(of_query)) + math.sqrt(math.log(4 / 0.1) / 2 / len(of_pool))
    bounds = (above_p + 1.01 * margin) / above_q
    best = int(np.argmin(bounds))
    return float(np.clip(above_p[best] / above_q[best], 0, 1)), float(np.clip(bounds[best], 0, 1))
