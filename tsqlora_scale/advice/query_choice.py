"""What ``sampling.selector: query`` would choose of the rows that were looked at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tsqlora_scale.common.random_streams import philox
from tsqlora_scale.config.schema import SamplingConfig
from tsqlora_scale.quality.draws.key_order import largest
from tsqlora_scale.quality.query.density_ratio import (
    EVIDENCE,
    DensityRatio,
    held_out_separation,
    surer_part,
    wanted_share,
)
from tsqlora_scale.quality.query.looks import Shape
from tsqlora_scale.quality.query.terms import Terms, fit_terms
from tsqlora_scale.quality.selectors.by_query import PRIOR
from tsqlora_scale.quality.selectors.ranked import quota_of

#: Resamples of both sides for the interval of the share on target.
RESAMPLES = 200


@dataclass(frozen=True)
class PoolRatio:
    """A pool's rows against those of a query.

    Attributes:
        terms: of the ratio, fitted to both.
        of_pool, of_query: log ratios (n,) and (m,), each by what has not seen the row.
        share: of the pool that is estimated to be as the query is, and its bound ``most``.
        area: probability that a row of the query has a higher ratio than one of the pool.
        evidence: standard errors by which that exceeds one half.
    """

    terms: Terms
    of_pool: np.ndarray
    of_query: np.ndarray
    share: float
    most: float
    area: float
    evidence: float

    @classmethod
    def fit(cls, shape: Shape, pool: np.ndarray, query: np.ndarray, *, seed: int, classes: int) -> PoolRatio:
        """As :class:`~tsqlora_scale.quality.query.query_rater.QueryRater` does, of numbers (n, ...) and (m, ...)."""
        terms, of_pool, of_query = fit_terms(shape, pool, query, seed=seed, classes=classes)
        ratio = DensityRatio.fit(of_pool, of_query, rising=terms.rising)
        area, evidence = held_out_separation(of_pool, of_query, rising=terms.rising, seed=seed)
        pool_ratio, query_ratio = ratio.log_ratio(of_pool), ratio.log_ratio(of_query)
        share, most = wanted_share(pool_ratio, query_ratio)
        return cls(terms, pool_ratio, query_ratio, share, most, area, evidence)

    @property
    def is_evident(self) -> bool:
        """Whether the query stands out of the pool at all."""
        return self.evidence > EVIDENCE

    def least(self, *, seed: int) -> float:
        """A lower bound of the share at about 95 %: by resamples of the rows of both sides."""
        generator = philox(seed, "share on target")
        found = []
        for _ in range(RESAMPLES):
            pool, query = (side[generator.integers(0, len(side), len(side))] for side in (self.of_pool, self.of_query))
            found.append(wanted_share(pool, query)[0])
        return float(np.quantile(found, 0.05))


def chosen_weights(
    ratio: PoolRatio,
    sampling: SamplingConfig,
    *,
    size: int,
    labels: np.ndarray | None = None,
    wanted: np.ndarray | None = None,
) -> np.ndarray:
    """How often each of the pool's rows (n,) is drawn, of those of the query 1: by the rule of ``selector: query``.

    Args:
        size: of the pool that the rows are a random part of.
        labels, wanted: class ids of the pool's rows (n,) and of the query's (m,); None without classes.
    """
    count, rows = len(ratio.of_pool), len(ratio.of_query)
    if not ratio.is_evident:
        return np.ones(count)
    kept = min(count, max(round(surer_part(ratio.share) * count), min(count, -(-rows * count // size))))
    strata, quota = None, np.array([kept])
    if labels is not None and wanted is not None and sampling.stratify is not False:
        strata = labels.astype(np.int64)
        shares = np.bincount(wanted.astype(np.int64), minlength=int(strata.max()) + 1) + float(PRIOR)
        quota = quota_of(np.bincount(strata), kept, shares)
    chosen = largest(ratio.of_pool, quota, strata)
    likely = np.exp(np.minimum(ratio.of_pool + np.log(max(ratio.share, 1e-3)), 0.0))
    return np.where(chosen, likely if sampling.soft else 1.0, 0.0)
