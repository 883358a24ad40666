"""``sampling.selector: rds``: RDS+, likeness of weighted mean hidden states to the query's, taken in turn.

Ivison et al., *Large-Scale Data Selection for Instruction Tuning*, 2503.01807: of everything that they compared at
scale the best, and by forward passes alone.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from tsqlora_scale.common.disk_arrays import blocks, new_array
from tsqlora_scale.quality.features.last_layer import LastLayerLook
from tsqlora_scale.quality.selectors.forward_selector import ForwardSelector
from tsqlora_scale.quality.selectors.in_turn import rated_by_turns
from tsqlora_scale.quality.selectors.ranked import Rating


class RdsSelector(ForwardSelector):
    """Cosines of the frozen base's last layer, tokens weighted by their places; the query's rows choose in turn."""

    def rate(self, module: nn.Module) -> Rating:
        """One forward pass over pool and query."""
        pool, query = self.seen(module, LastLayerLook(by_position=True), name="last layer by position")

        def found() -> tuple[np.ndarray, np.ndarray]:
            likeness = cosines_to(pool, query)
            ratings = likeness.max(1).astype(np.float64)
            ratings[: self.choices] = rated_by_turns(likeness[: self.choices], self.places)
            return ratings, likeness.max(1).astype(np.float64)

        ratings, nearest = self.context.world.from_main(found)
        return Rating(ratings, terms={"nearest_query": nearest})


def cosines_to(pool: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Cosines (N, Q) float32 of rows (N, d) and (Q, d), mapped to disk where they are many; 0 where either is zero."""
    wanted = unit(query)
    cosines = new_array(len(pool) * len(query), np.float32).reshape(len(pool), len(query))
    for block in blocks(len(pool), 2**14):
        cosines[block] = np.clip(unit(pool[block]) @ wanted.T, -1, 1)
    return cosines


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (n, d) scaled to unit length, float32; zero stays zero."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    scaled: np.ndarray = (rows / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
    return scaled
