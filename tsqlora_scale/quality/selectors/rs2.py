"""``sampling.selector: rs2``: a random part of the pool, drawn anew for every epoch over it.

Okanovic et al., *Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning*, 2305.18424: at equal steps
a hard baseline of every choice that is made once. Rounds are drawn independently of one another, as their RS2 with
replacement; without, it would be even draws from the whole pool.
"""

from __future__ import annotations

import numpy as np

from tsqlora_scale.quality.draws.batch_sampler import BatchSampler
from tsqlora_scale.quality.draws.redrawn_sampler import RedrawnSampler
from tsqlora_scale.quality.draws.subset import share_of
from tsqlora_scale.quality.selectors.full import FullSelector


class RedrawnSelector(FullSelector):
    """Rounds of ``ceil(keep_fraction * N)`` samples, and the query's rows in each; nothing is scored."""

    def _make_sampler(self, rows: np.ndarray, probabilities: np.ndarray | None, *, start: int) -> BatchSampler:
        """Rounds of ``rows``, all of the pool."""
        size = len(self.pool) - self.pool.query_rows
        among = rows[:size]
        return RedrawnSampler(
            among,
            self._weighted(among, None),
            count=share_of(self.config.sampling.most_kept, size),
            always=rows[size:],
            batch_size=self.config.train.batch_size,
            seed=self.config.run.seed,
        )
