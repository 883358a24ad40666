"""A selector of one's own: a curriculum that starts with short samples and lets longer ones in, step by step.

    python launch/train.py --config configs/quickstart.yaml sampling.selector=examples/selector.py:ShortFirst

What a selector draws has to be a function of the seed and the step alone: then it is the same on every rank, and a run
that is resumed goes on as it was.
"""

from __future__ import annotations

import numpy as np

from tsqlora_scale.common.random_streams import philox
from tsqlora_scale.quality.selectors.full import FullSelector
from tsqlora_scale.quality.selectors.selector import SelectorContext


class ShortFirst(FullSelector):
    """Draws evenly from the shortest share of the pool, a tenth at first, all of it from the middle of the run on."""

    def __init__(self, context: SelectorContext) -> None:
        super().__init__(context)
        self._by_length = np.argsort(context.pool.lengths(), kind="stable")
        train = context.config.train
        steps = train.max_steps or (train.epochs or 1) * len(context.pool) / train.batch_size
        self._half = max(steps / 2, 1)

    def draw(self, step: int) -> np.ndarray:
        """(batch_size,) rows of the pool."""
        share = min(1.0, 0.1 + 0.9 * step / self._half)
        allowed = max(1, int(share * len(self._by_length)))
        generator = philox(self.config.run.seed, "short first", step)
        rows: np.ndarray = self._by_length[generator.integers(0, allowed, self.config.train.batch_size)]
        return rows
