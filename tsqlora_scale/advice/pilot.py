"""What short trials say: ways to train, judged on the query's rows that had no part in any of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tsqlora_scale.advice.paired import Difference, Gain
from tsqlora_scale.config.schema import Config

#: The ways: the pool and the query, evenly; the query's rows alone; what is chosen by the query, and the query; the
#: pool without the query's rows, evenly.
EVEN, ALONE, QUERY, POOL = "even", "query alone", "query", "pool alone"


def ways_of(config: Config) -> tuple[str, ...]:
    """What is tried for a run: where ``task.train_on_query`` is off, its even draws are of the pool alone."""
    return (EVEN, ALONE, QUERY, POOL) if config.task.train_on_query else (EVEN, ALONE, QUERY)


@dataclass(frozen=True)
class Pilot:
    """One entry a row of the query, (m,), of every way.

    Attributes:
        kind: what was trained: ``heads`` or ``adapters``.
        fits: log-likelihood of the row's answer, of a number up to a constant.
        hits: whether the answer was right, 0 or 1; None where answers are no classes.
        notes: for a reader.
    """

    kind: str
    fits: dict[str, np.ndarray]
    hits: dict[str, np.ndarray] | None
    notes: dict[str, float] = field(default_factory=dict)

    def gain(self, way: str, less: str, *, seed: int) -> Gain:
        """Of a way over another."""
        points = None if self.hits is None else Difference.paired(self.hits[way], self.hits[less], seed=seed)
        return Gain(Difference.paired(self.fits[way], self.fits[less], seed=seed), points)
