"""A selector that a study chooses by the config: even draws first, by the pool's own weights later."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from tsqlora_scale.common.disk_arrays import positions
from tsqlora_scale.quality.selectors.full import FullSelector
from tsqlora_scale.quality.selectors.selector import SelectorContext

#: Rows of no more weight are not drawn at all, later. (Those of weight 0 never are: they leave the pool as it is read.)
FORGOTTEN = 1e-6


class LateWeights(FullSelector):
    """Draws evenly for ``scoring.warmup_steps`` steps, then by ``task.dataset.weight``; see :data:`FORGOTTEN`.

    What is to be forgotten late rather than never learned: wrong labels do their harm when they are memorised, and may
    do some good before.
    """

    def __init__(self, context: SelectorContext) -> None:
        self._weighs = False
        super().__init__(context)

    def due(self, step: int) -> bool:
        """After the warm-up, once."""
        start = self.context.scoring_step
        return not self._weighs and start is not None and step >= start

    def score(self, module: nn.Module, step: int) -> None:
        """Nothing is looked at: the weights are there already. A collective."""
        self._weighs = True
        with self.context.world.together():
            assert self._draw_weights is not None, "task.dataset.weight names no column"
            rows = positions(self._draw_weights > FORGOTTEN)
            self._sampler = self._make_sampler(rows, None, start=step)

    def state_dict(self) -> dict[str, Any]:
        """The sampler's, and whether the weights count by now."""
        return {**super().state_dict(), "weighs": self._weighs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~tsqlora_scale.quality.selectors.selector.Selector`."""
        if state["weighs"]:
            self.score(nn.Identity(), state["sampler"]["start"])
        super().load_state_dict(state)

    def _weighted(self, rows: np.ndarray, probabilities: np.ndarray | None) -> np.ndarray | None:
        weights = super()._weighted(rows, probabilities) if self._weighs else None
        # alike they are as without: each row once an epoch
        return None if weights is None or weights.min() == weights.max() else weights
