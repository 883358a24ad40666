"""``sampling.selector: random``: a random part of the pool, evenly. What a choice by quality has to beat."""

from __future__ import annotations

import numpy as np

from tsqlora_scale.common.disk_arrays import positions
from tsqlora_scale.quality.draws.subset import select_subset
from tsqlora_scale.quality.selectors.full import FullSelector


class RandomSelector(FullSelector):
    """Draws from ``ceil(keep_fraction * N)`` samples, drawn once by the seed; with ``sampling.stratify: true`` in the
    shares that labels have in the pool.
    """

    def subset(self) -> np.ndarray:
        """The part."""
        sampling, seed = self.config.sampling, self.config.run.seed
        strata = self.pool.strata() if sampling.stratify is True else None
        size, own = len(self.pool), self.pool.query_rows
        return positions(select_subset(size, None, sampling, seed=seed, strata=strata, always=own))
