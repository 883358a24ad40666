"""A pool against the rows of a query: features by forward passes, terms, and the density ratio of every row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora_scale.common.disk_arrays import blocks, filled, new_array, positions
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.random_streams import philox, uniform
from tsqlora_scale.config.schema import ScoringConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality.draws.key_order import smallest
from tsqlora_scale.quality.features.forward_pass import ForwardPass
from tsqlora_scale.quality.pool import Pool
from tsqlora_scale.quality.query.density_ratio import Standing, stand
from tsqlora_scale.quality.query.looks import FeatureLook, Shape
from tsqlora_scale.quality.query.terms import Terms, fit_terms

#: Rows of the pool that models are fitted to; of a larger one a random part.
FITTED = 10_000


@dataclass(frozen=True)
class QueryRating:
    """What a pool is worth for the query's task.

    Attributes:
        log_ratio: log density ratio of wanted to pool, up to a constant, (N,), the query's own rows by models that have
            not seen them.
        terms: by name, (N,) each.
        coefficients: of the standardised terms, by name.
        standing: of the query to the pool.
    """

    log_ratio: np.ndarray
    terms: dict[str, np.ndarray]
    coefficients: dict[str, float]
    standing: Standing


class QueryRater:
    """Rates a pool by its query. Everything is the same on every rank.

    Args:
        scoring: batches, and how texts are cut.
        pool: the samples; at their end the query's own, if these are trained on.
        world: the ranks.
        seed: of the run.
        model_name: says which base the model has.
        progress: told (samples done, samples of the pass).
        folder: where numbers are kept while a pass runs.
    """

    def __init__(
        self,
        scoring: ScoringConfig,
        *,
        pool: Pool[Any],
        world: World,
        seed: int,
        model_name: str = "",
        progress: Callable[[int, int], None] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.pool, self.world, self.seed = pool, world, seed
        self._scoring, self._name, self._progress, self._folder = scoring, model_name, progress, folder

    def rate(self, module: nn.Module) -> QueryRating:
        """Look at every sample once, of a large pool at some twice. A collective.

        Raises:
            UserError: a sample does not fit in memory, or the disk has no room; on every rank.
        """
        query = self.pool.query
        assert query is not None, "needs a query"
        size = len(self.pool) - self.pool.query_rows
        rows = self._fitted(size)
        scoring = self._scoring
        passes = ForwardPass(
            module,
            self.world,
            batch_size=scoring.batch_size,
            shard_size=scoring.shard_size,
            max_length=scoring.max_length,
            progress=self._progress,
            folder=self._folder,
        )
        look = FeatureLook(self.pool, seed=self.seed)
        name = f"features {self._name} {self.seed}"
        wanted = passes.run(query, np.arange(len(query)), look, name=name)
        numbers = passes.run(self.pool, rows, look, name=name)
        shape = look.agreed_shape(module, self.world, max_length=scoring.max_length)
        terms, of_rows, of_query = self._fit(shape, numbers, wanted)
        ratio, standing = self.world.from_main(lambda: stand(of_rows, of_query, rising=terms.rising, seed=self.seed))
        values = new_array(len(self.pool) * len(terms.names), np.float32).reshape(len(self.pool), len(terms.names))
        values[rows] = of_rows
        if len(rows) < size:
            rest = filled(size, bool, True)
            rest[rows] = False
            places = positions(rest)
            seen = passes.run(self.pool, places, _TermLook(look, terms), name=f"terms of {name}")
            for block in blocks(len(places)):
                values[places[block]] = seen[block]
        if self.pool.query_rows:
            values[size:] = of_query
        passes.forget()
        log_ratio = new_array(len(values), np.float64)
        columns = {name: new_array(len(values), np.float64) for name in terms.names}
        for block in blocks(len(values)):
            log_ratio[block] = ratio.log_ratio(values[block])
            for place, column in enumerate(columns.values()):
                column[block] = values[block][:, place]
        coefficients = dict(zip(terms.names, ratio.coefficients.tolist(), strict=True))
        return QueryRating(log_ratio=log_ratio, terms=columns, coefficients=coefficients, standing=standing)

    def _fitted(self, size: int) -> np.ndarray:
        if size <= FITTED:
            return np.arange(size)
        return positions(smallest(uniform(philox(self.seed, "fitted to the pool"), size), FITTED))

    def _fit(self, shape: Shape, numbers: np.ndarray, wanted: np.ndarray) -> tuple[Terms, np.ndarray, np.ndarray]:
        def fit() -> tuple[Terms, np.ndarray, np.ndarray]:
            if not (np.isfinite(numbers).all() and np.isfinite(wanted).all()):
                raise UserError(
                    "the hidden states of the base are not finite, and a choice by task.query needs them; its weights "
                    "are damaged, or it computes in too coarse a type: use model.dtype=fp32"
                )
            return fit_terms(shape, numbers, wanted, seed=self.seed, classes=self._classes())

        return self.world.from_main(fit)

    def _classes(self) -> int:
        """One more than the largest class of pool and query; 0 without classes."""
        assert self.pool.query is not None
        ids = [found for found in (self.pool.class_ids(), self.pool.query.class_ids()) if found is not None]
        return max((int(found.max()) + 1 for found in ids), default=0)


class _TermLook:
    """The terms of the samples of a batch, by one forward."""

    def __init__(self, look: FeatureLook, terms: Terms) -> None:
        self._look, self._terms = look, terms

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        """(B, m) float32."""
        numbers = self._look(module, batch).double().cpu().numpy()
        assert self._look.shape is not None
        return torch.from_numpy(self._terms.values(*self._look.shape.split(numbers)))
