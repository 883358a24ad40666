"""A pool against the rows of a query: features by forward passes, terms, and the density ratio of every row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora_scale.common.copies import text_key
from tsqlora_scale.common.disk_arrays import blocks, filled, new_array, positions
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.random_streams import philox, uniform
from tsqlora_scale.config.schema import ScoringConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality.draws.key_order import smallest
from tsqlora_scale.quality.features.forward_pass import ForwardPass
from tsqlora_scale.quality.pool import Pool
from tsqlora_scale.quality.query.density_ratio import Standing
from tsqlora_scale.quality.query.looks import FeatureLook, Shape
from tsqlora_scale.quality.query.model_copies import are_alike, groups_to_a_model
from tsqlora_scale.quality.query.row_rating import RowRating

#: Rows of the pool that models are fitted to; of a larger one a random part.
FITTED = 10_000
#: A text, and its answer.
Key = tuple[bytes, float]


@dataclass(frozen=True)
class QueryRating:
    """What a pool is worth for the query's task.

    Attributes:
        log_ratio: log density ratio of wanted to pool, up to a constant, (N,), the query's own rows by models that have
            not seen them.
        terms: by name, (N,) each.
        coefficients: of the standardised terms, by name.
        standing: of the query to the pool.
        wanted: the probability that a row is, (N,); 1 without evidence.
        agrees: whether the pool expects its answer, (N,) bool, and of the query's rows (n,); None where that is not
            known.
    """

    log_ratio: np.ndarray
    terms: dict[str, np.ndarray]
    coefficients: dict[str, float]
    standing: Standing
    wanted: np.ndarray
    agrees: tuple[np.ndarray, np.ndarray] | None


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
        with self.world.together():
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
        with self.world.together():
            texts = [*self.pool.texts(rows), *query.texts(np.arange(len(query)))]
            copies = groups_to_a_model(texts, np.concatenate([numbers, wanted]))
        rating = self._fit(shape, numbers, wanted, copies)
        columns = len(rating.names)
        with self.world.together():
            values = new_array(len(self.pool) * columns, np.float32).reshape(len(self.pool), columns)
            values[rows] = rating.of_pool
            rest = filled(size, bool, True)
            rest[rows] = False
            places = positions(rest)
        if len(rows) < size:
            kind = f"terms, copies to the model known, of {name}: {' '.join(rating.names)}"
            seen = passes.run(self.pool, places, _TermLook(look, rating, self.pool, rows, numbers), name=kind)
            for block in blocks(len(places)):
                values[places[block]] = seen[block]
        if self.pool.query_rows:
            values[size:] = rating.of_query
        passes.forget()
        with self.world.together():
            return _told(rating, values)

    def _fitted(self, size: int) -> np.ndarray:
        if size <= FITTED:
            return np.arange(size)
        return positions(smallest(uniform(philox(self.seed, "fitted to the pool"), size), FITTED))

    def _fit(self, shape: Shape, numbers: np.ndarray, wanted: np.ndarray, copies: np.ndarray) -> RowRating:
        def fit() -> RowRating:
            if not (np.isfinite(numbers).all() and np.isfinite(wanted).all()):
                raise UserError(
                    "the hidden states of the base are not finite, and a choice by task.query needs them; its weights "
                    "are damaged, or it computes in too coarse a type: use model.dtype=fp32"
                )
            return RowRating.fit(shape, numbers, wanted, copies=copies, seed=self.seed, classes=self._classes())

        return self.world.from_main(fit)

    def _classes(self) -> int:
        """One more than the largest class of pool and query; 0 without classes."""
        assert self.pool.query is not None
        ids = [found for found in (self.pool.class_ids(), self.pool.query.class_ids()) if found is not None]
        return max((int(found.max()) + 1 for found in ids), default=0)


def _told(rating: RowRating, values: np.ndarray) -> QueryRating:
    """Of all rows, from their values (N, m)."""
    size = len(values)
    log_ratio, wanted = new_array(size, np.float64), new_array(size, np.float64)
    expected = None if rating.mixture is None else new_array(size, bool)
    columns = {name: new_array(size, np.float64) for name in rating.names}
    for block in blocks(size):
        log_ratio[block], wanted[block] = rating.log_ratio(values[block]), rating.wanted(values[block])
        if expected is not None:
            expected[block] = rating.agrees(values[block])
        for place, column in enumerate(columns.values()):
            column[block] = values[block][:, place]
    of_query = rating.agrees(rating.of_query)
    return QueryRating(
        log_ratio=log_ratio,
        terms=columns,
        coefficients=dict(zip(rating.terms.names, rating.ratio.coefficients.tolist(), strict=True)),
        standing=rating.standing,
        wanted=wanted,
        agrees=None if expected is None or of_query is None else (expected, of_query),
    )


class _TermLook:
    """The values of the samples of a batch, by one forward; of one whose text and answer have been rated in the fitted
    part, those of its copy there, which the models have not seen when they judged it. (One whose text has another
    answer there is judged by models that have seen the text.)

    Args:
        fitted: rows of the pool that the rating is fitted to, (n,), and their ``numbers``, (n, ...).
    """

    def __init__(
        self, look: FeatureLook, rating: RowRating, pool: Pool[Any], fitted: np.ndarray, numbers: np.ndarray
    ) -> None:
        self._look, self._rating, self._pool = look, rating, pool
        self._numbers = numbers
        #: By text and answer: the place of the one that is the same to the letter, and of those that are but for case
        #: and spaces.
        self._exact: dict[Key, int] = {}
        self._loose: dict[Key, list[int]] = {}
        if rating.shape.kind != "text":  # of texts no model of the pool's answers is fitted
            for place, (exact, loose) in enumerate(self._keys(fitted, numbers)):
                if self._exact.setdefault(exact, place) == place:
                    self._loose.setdefault(loose, []).append(place)

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        """(B, m) float32."""
        numbers = self._look(module, batch).double().cpu().numpy()
        values = self._rating.values(numbers)
        if self._exact:
            for place, keys in enumerate(self._keys(batch.indices, numbers)):
                if (copy := self._copy(numbers[place], *keys)) is not None:
                    values[place] = self._rating.of_pool[copy]
        return torch.from_numpy(values)

    def _copy(self, numbers: np.ndarray, exact: Key, loose: Key) -> int | None:
        """The place of a row's copy in the fitted part, if it has one there."""
        if exact in self._exact:
            return self._exact[exact]
        alike = (place for place in self._loose.get(loose, ()) if are_alike(numbers[:-1], self._numbers[place, :-1]))
        return next(alike, None)

    def _keys(self, rows: np.ndarray, numbers: np.ndarray) -> list[tuple[Key, Key]]:
        _, answers = self._rating.shape.split(numbers)
        return [
            ((text_key(*texts, exact=True), answer), (text_key(*texts), answer))
            for texts, answer in zip(self._pool.texts(rows), answers.tolist(), strict=True)
        ]
