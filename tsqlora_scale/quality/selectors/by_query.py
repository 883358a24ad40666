"""``sampling.selector: query``: train on what is like the rows of ``task.query``, by the ratio of their densities."""

from __future__ import annotations

import numpy as np
from torch import nn

from tsqlora_scale.common.disk_arrays import new_array
from tsqlora_scale.quality.query.density_ratio import surer_part
from tsqlora_scale.quality.query.query_rater import QueryRater, QueryRating
from tsqlora_scale.quality.selectors.ranked import RankedSelector, Rating

#: Rows of every class that are added to the query's before its shares are taken: few rows say little of them.
PRIOR = 2


class QuerySelector(RankedSelector):
    """Eq. 1's convergence term as what it says: contribution to convergence *on the wanted task*, and that alone.

    ``sampling.keep_fraction: auto`` keeps the surer part of the share that is found to be as the query is
    (:func:`.surer_part`); all of the pool where the query does not stand out, for a choice without evidence costs
    samples. Classes have the query's shares in S, unless ``sampling.stratify`` is false. Within S, draws are by the
    probability that a sample is wanted (``sampling.soft``).
    """

    def rate(self, module: nn.Module) -> Rating:
        """See :class:`~tsqlora_scale.quality.query.query_rater.QueryRater`."""
        config, context = self.config, self.context
        rater = QueryRater(
            config.scoring,
            pool=self.pool,
            world=context.world,
            seed=config.run.seed,
            model_name=f"{config.model.name_or_path} {config.model.dtype} {config.model.quantization}",
            progress=context.progress,
            folder=context.parts_folder,
        )
        found = rater.rate(module)
        return Rating(
            quality=found.log_ratio,
            terms=found.terms,
            keep=self._keep(found),
            shares=self._shares(),
            strata=self.pool.class_ids(),
            weights=self._weights(found) if config.sampling.soft else None,
            findings={
                "share on target": round(found.share, 4),
                "at most": round(found.most, 4),
                "query against pool": {"area": round(found.area, 4), "standard errors": round(found.evidence, 2)},
                "evident": found.is_evident,
                "coefficients": {name: round(value, 4) for name, value in found.coefficients.items()},
            },
        )

    def _keep(self, found: QueryRating) -> int:
        size = len(self.pool) - self.pool.query_rows
        if not found.is_evident:
            return size
        assert self.pool.query is not None
        return min(size, max(round(surer_part(found.share) * size), len(self.pool.query)))

    def _weights(self, found: QueryRating) -> np.ndarray:
        """The probability that a row is wanted, (N,): ``pi q / p``, and 1 for the query's own; 1 without evidence."""
        weights = new_array(len(self.pool), np.float64)
        if not found.is_evident:
            weights[:] = 1.0
            return weights
        np.minimum(found.log_ratio + np.log(max(found.share, 1e-3)), 0.0, out=weights)
        np.exp(weights, out=weights)
        weights[len(self.pool) - self.pool.query_rows :] = 1.0
        return weights

    def _shares(self) -> np.ndarray | None:
        """Of the classes among the query's rows; None without classes, or if ``sampling.stratify`` is false."""
        query = None if self.config.sampling.stratify is False else self.pool.query
        ids, all_ids = (None if query is None else query.class_ids()), self.pool.class_ids()
        if ids is None or all_ids is None:
            return None
        return np.bincount(ids, minlength=int(all_ids.max()) + 1) + float(PRIOR)
