"""What ``sampling.selector: query`` would choose of the rows that were looked at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tsqlora_scale.advice.pool_sample import PoolSample
from tsqlora_scale.common.random_streams import philox
from tsqlora_scale.config.schema import Config, SamplingConfig
from tsqlora_scale.quality.draws.key_order import largest
from tsqlora_scale.quality.query.choice_rule import balanced, kept_rows
from tsqlora_scale.quality.query.density_ratio import Standing, wanted_share
from tsqlora_scale.quality.query.looks import Shape
from tsqlora_scale.quality.query.row_rating import RowRating
from tsqlora_scale.quality.query.terms import Likeness
from tsqlora_scale.quality.selectors.ranked import quota_of

#: Resamples of both sides for the interval of the share on target.
RESAMPLES = 200


@dataclass(frozen=True)
class PoolRatio:
    """A pool's rows against those of a query.

    Attributes:
        of_pool, of_query: how surely rows are wanted, (n,) and (m,), each by what has not seen the row.
        standing: of the query to the pool.
        wanted: the probability that a row of the pool is, (n,).
        agrees: whether the pool expects its answer, (n,) bool and (m,) bool; None where that is not known.
        likeness: of texts.
    """

    of_pool: np.ndarray
    of_query: np.ndarray
    standing: Standing
    wanted: np.ndarray
    agrees: tuple[np.ndarray, np.ndarray] | None = None
    likeness: Likeness | None = None

    @classmethod
    def fit(
        cls, shape: Shape, pool: np.ndarray, query: np.ndarray, *, copies: np.ndarray, seed: int, classes: int
    ) -> PoolRatio:
        """As :class:`~tsqlora_scale.quality.query.query_rater.QueryRater` does, of numbers (n, ...) and (m, ...), and
        of groups of copies among both (n + m,)."""
        rating = RowRating.fit(shape, pool, query, copies=copies, seed=seed, classes=classes)
        pool_agrees, query_agrees = (rating.agrees(side) for side in (rating.of_pool, rating.of_query))
        return cls(
            of_pool=rating.log_ratio(rating.of_pool),
            of_query=rating.log_ratio(rating.of_query),
            standing=rating.standing,
            wanted=rating.wanted(rating.of_pool),
            agrees=None if pool_agrees is None or query_agrees is None else (pool_agrees, query_agrees),
            likeness=rating.terms.likeness,
        )

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
    if not ratio.standing.is_evident:
        return np.ones(count)
    soft = sampling.soft and sampling.learns_by_weight
    kept = kept_rows(ratio.standing, count, least=min(count, -(-rows * count // size)), soft=soft)
    strata, quota = None, np.array([kept])
    if sampling.stratify is not False:
        strata, shares = balanced((labels, wanted), ratio.agrees, ratio.wanted)
        if strata is not None:
            quota = quota_of(np.bincount(strata), kept, shares)
    chosen = largest(ratio.of_pool, quota, strata)
    return np.where(chosen, ratio.wanted if soft else 1.0, 0.0)


def choice_by_others(
    config: Config, sample: PoolSample, out: np.ndarray, *, classes: int
) -> tuple[PoolRatio, np.ndarray]:
    """The pool against the query without its rows ``out`` (m,) bool, and what is chosen so: :func:`chosen_weights`.

    Args:
        classes: of the task.
    """
    count, labelled, answers = sample.count, sample.shape.kind == "classes", sample.answers
    pool, rest = sample.numbers[:count], sample.numbers[count:][~out]
    known = np.append(np.ones(count, dtype=bool), ~out)
    ratio = PoolRatio.fit(
        sample.shape, pool, rest, copies=sample.copies[known], seed=config.run.seed, classes=classes if labelled else 0
    )
    chosen = chosen_weights(
        ratio,
        config.sampling,
        size=sample.size,
        labels=answers[:count] if labelled else None,
        wanted=answers[count:][~out] if labelled else None,
    )
    return ratio, chosen
