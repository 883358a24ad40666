"""``sampling.selector: k_center``: a core set, no sample of the pool far from all of it.

Sener and Savarese, *Active Learning for Convolutional Neural Networks: A Core-Set Approach*, 1708.00489 (Algorithm 1,
k-Center-Greedy), as Chen et al. choose by it, *Maybe Only 0.5 % Data is Needed*, 2305.09246: on embeddings of texts.
There a task's cluster of a mixture comes first; here the pool is the one that is given.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from tsqlora_scale.common.disk_arrays import blocks, new_array
from tsqlora_scale.quality.features.last_layer import LastLayerLook
from tsqlora_scale.quality.selectors.forward_selector import ForwardSelector
from tsqlora_scale.quality.selectors.ranked import Rating


class KCenterSelector(ForwardSelector):
    """Greedy k-center on mean hidden states of the frozen base's last layer; the query's rows are centers from the
    start, where they are trained on."""

    def rate(self, module: nn.Module) -> Rating:
        """One forward pass, then one look at all features for every sample that is kept."""
        features, _ = self.seen(module, LastLayerLook(by_position=False), name="last layer")

        def found() -> np.ndarray:
            ratings = np.full(len(features), np.inf)
            ratings[: self.choices] = center_ratings(
                features[: self.choices], features[self.choices :], min(self.places, self.choices)
            )
            ratings[self.choices :] = ratings[: self.choices].max()
            return ratings

        return Rating(self.context.world.from_main(found))


def center_ratings(features: np.ndarray, centers: np.ndarray, count: int) -> np.ndarray:
    """Ratings (n,) float64: the earlier a sample becomes a center the higher, the others by their distance to the next
    center, below all centers.

    The first center is the sample nearest to the mean, unless there are ``centers`` already; every further one is that
    with the largest distance to its nearest center. The largest such distance is at most twice the least possible one.

    Args:
        features: (n, d) float32, n >= 1.
        centers: (c, d) float32, that have been chosen before.
        count: how many to choose, at most n.
    """
    squares = _blockwise(features, lambda x: np.square(x).sum(1))
    if len(centers):
        nearest = np.full(len(features), np.inf)
        for center in centers.astype(np.float64):
            np.minimum(nearest, _distances(features, squares, center), out=nearest)
    else:
        mean = features.mean(0, dtype=np.float64)
        nearest = -_distances(features, squares, mean)  # the nearest one is the first choice
    ratings = np.zeros(len(features))
    chosen = np.zeros(len(features), dtype=bool)
    for number in range(count):
        place = int(np.argmax(np.where(chosen, -np.inf, nearest)))
        ratings[place], chosen[place] = 1 + (count - number) / count, True
        distances = _distances(features, squares, features[place].astype(np.float64))
        nearest = np.minimum(nearest, distances) if number or len(centers) else distances
    left = ~chosen
    if left.any():
        ratings[left] = np.maximum(nearest[left], 0) / max(float(nearest[left].max()), 1e-300)
    return ratings


def _distances(features: np.ndarray, squares: np.ndarray, center: np.ndarray) -> np.ndarray:
    """Squared distances (n,) float64; what is but rounding is 0, so that copies of a center are none."""
    products = _blockwise(features, lambda x: x @ center)
    distances: np.ndarray = squares - 2 * products + center @ center
    return np.where(distances > 1e-9 * (squares + center @ center), distances, 0.0)


def _blockwise(features: np.ndarray, of_block: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A number of every sample, (n,) float64."""
    numbers = new_array(len(features), np.float64)
    for block in blocks(len(features), 2**16):
        numbers[block] = of_block(features[block].astype(np.float64))
    return numbers
