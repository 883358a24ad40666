"""``sampling.selector: query``: train on what is like the rows of ``task.query``, by the ratio of their densities."""

from __future__ import annotations

import numpy as np
from torch import nn

from tsqlora_scale.common.disk_arrays import copied
from tsqlora_scale.quality.query.choice_rule import balanced, kept_rows
from tsqlora_scale.quality.query.query_rater import QueryRater, QueryRating
from tsqlora_scale.quality.selectors.ranked import RankedSelector, Rating
from tsqlora_scale.quality.selectors.selector import SelectorContext


class QuerySelector(RankedSelector):
    """Eq. 1's convergence term as what it says: contribution to convergence *on the wanted task*, and that alone.

    ``sampling.keep_fraction: auto`` keeps what :func:`.kept_rows` says of the share that is found wanted; all of the
    pool where the query does not stand out, for a choice without evidence costs samples. Unless ``sampling.stratify``
    is false, classes have the query's shares in S, and so have the rows whose answer the pool expects
    (:func:`.strata_shares`). Within S, draws are by the probability that a sample is wanted (``sampling.soft``).
    """

    def rate(self, module: nn.Module) -> Rating:
        """See :class:`~tsqlora_scale.quality.query.query_rater.QueryRater`."""
        found = query_rater(self.context).rate(module)
        standing = found.standing
        with self.context.world.together():
            strata, shares = self._strata(found)
            weights = self._weights(found) if self.config.sampling.soft else None
        return Rating(
            quality=found.log_ratio,
            terms=found.terms,
            keep=self._keep(found),
            shares=shares,
            strata=strata,
            weights=weights,
            findings={
                "share on target": round(standing.share, 4),
                "at most": round(standing.most, 4),
                "query against pool": {
                    "area": round(standing.area, 4),
                    "standard errors": round(standing.evidence, 2),
                },
                "evident": standing.is_evident,
                "coefficients": {name: round(value, 4) for name, value in found.coefficients.items()},
            },
        )

    def _keep(self, found: QueryRating) -> int:
        assert self.pool.query is not None
        size = len(self.pool) - self.pool.query_rows
        sampling = self.config.sampling
        soft = sampling.soft and sampling.learns_by_weight
        return kept_rows(found.standing, size, least=len(self.pool.query), soft=soft)

    def _weights(self, found: QueryRating) -> np.ndarray:
        """The probability that a row is wanted, (N,); 1 for the query's own."""
        weights = copied(found.wanted)
        weights[len(self.pool) - self.pool.query_rows :] = 1.0
        return weights

    def _strata(self, found: QueryRating) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Of the pool's rows (N,), and the strata's shares in S; None of both where all rows are alike, or if
        ``sampling.stratify`` is false."""
        query = self.pool.query
        if query is None or self.config.sampling.stratify is False:
            return None, None
        classes, rest = (self.pool.class_ids(), query.class_ids()), len(self.pool) - self.pool.query_rows
        return balanced(classes, found.agrees, found.wanted[:rest])


def query_rater(context: SelectorContext) -> QueryRater:
    """A rater of a run's pool."""
    config = context.config
    return QueryRater(
        config.scoring,
        pool=context.pool,
        world=context.world,
        seed=config.run.seed,
        model_name=config.model.weights_name,
        progress=context.progress,
        folder=context.parts_folder,
    )
