"""``sampling.selector: query``: train on what is like the rows of ``task.query``, by the ratio of their densities."""

from __future__ import annotations

import numpy as np
from torch import nn

from tsqlora_scale.quality.query.choice_rule import class_shares, kept_rows, wanted_probability
from tsqlora_scale.quality.query.query_rater import QueryRater, QueryRating
from tsqlora_scale.quality.selectors.ranked import RankedSelector, Rating
from tsqlora_scale.quality.selectors.selector import SelectorContext


class QuerySelector(RankedSelector):
    """Eq. 1's convergence term as what it says: contribution to convergence *on the wanted task*, and that alone.

    ``sampling.keep_fraction: auto`` keeps the surer part of the share that is found to be as the query is
    (:func:`.surer_part`); all of the pool where the query does not stand out, for a choice without evidence costs
    samples. Classes have the query's shares in S, unless ``sampling.stratify`` is false. Within S, draws are by the
    probability that a sample is wanted (``sampling.soft``).
    """

    def rate(self, module: nn.Module) -> Rating:
        """See :class:`~tsqlora_scale.quality.query.query_rater.QueryRater`."""
        found, classes = query_rater(self.context).rate(module), self.pool.class_ids()
        standing = found.standing
        return Rating(
            quality=found.log_ratio,
            terms=found.terms,
            keep=self._keep(found),
            shares=self._shares(classes),
            strata=classes,
            weights=self._weights(found) if self.config.sampling.soft else None,
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
        return kept_rows(found.standing, size, least=len(self.pool.query))

    def _weights(self, found: QueryRating) -> np.ndarray:
        """The probability that a row is wanted, (N,); 1 for the query's own."""
        weights = wanted_probability(found.log_ratio, found.standing)
        weights[len(self.pool) - self.pool.query_rows :] = 1.0
        return weights

    def _shares(self, classes: np.ndarray | None) -> np.ndarray | None:
        """Of the pool's ``classes`` in S; None without classes, or if ``sampling.stratify`` is false."""
        query = None if self.config.sampling.stratify is False else self.pool.query
        wanted = None if query is None else query.class_ids()
        return None if wanted is None or classes is None else class_shares(wanted, int(classes.max()) + 1)


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
