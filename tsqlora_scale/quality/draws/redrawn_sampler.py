"""Minibatches of a subset that is drawn anew for every epoch over it."""

from __future__ import annotations

from typing import Any

import numpy as np

from tsqlora_scale.common.random_streams import philox
from tsqlora_scale.quality.draws.batch_sampler import BatchSampler


class RedrawnSampler(BatchSampler):
    """Every round draws ``count`` samples without replacement, by the weights if there are any, and goes through them
    once. As :class:`.BatchSampler`, a function of the step alone.

    Args:
        indices: pool indices, (n,).
        weights: of these, (n,), nonnegative, of any positive sum; None is uniform.
        count: samples of a round, beside those that every round has.
        always: pool indices that every round has.
        batch_size, seed: of the run.
    """

    def __init__(
        self,
        indices: np.ndarray,
        weights: np.ndarray | None,
        *,
        count: int,
        always: np.ndarray,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__(indices, weights, batch_size=batch_size, seed=seed, replacement=False)
        self.count, self.always = count, always
        self._rounds: dict[int, np.ndarray] = {}

    def ahead(self, step: int) -> np.ndarray:
        """Pool indices (batch_size,) of optimizer step ``step`` of the run."""
        first, stop = step * self.batch_size, (step + 1) * self.batch_size
        size = self.count + len(self.always)
        parts = []
        while first < stop:
            number, offset = divmod(first, size)
            parts.append(self._round(number)[offset : offset + stop - first])
            first += len(parts[-1])
        return np.concatenate(parts)

    def state_dict(self) -> dict[str, Any]:
        """What the draws depend on."""
        return {**super().state_dict(), "count": self.count, "always": len(self.always)}

    def _round(self, number: int) -> np.ndarray:
        if number not in self._rounds:
            if len(self._rounds) >= 2:  # a cache, not a state
                self._rounds.clear()
            order, places = self._order(number), np.empty(0, dtype=np.int64)
            while len(places) < self.count:  # a stretch of a large pool's order at a time
                places = np.concatenate([places, order.part(len(places), self.count)])
            members = np.concatenate([self.indices[places], self.always])
            if len(self.always):
                members = members[philox(self.seed, "round with the query", number).permutation(len(members))]
            self._rounds[number] = members
        return self._rounds[number]
