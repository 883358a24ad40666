"""Features of many samples as unit vectors, in the units of the pool: their products are mean cosines over layers."""

from __future__ import annotations

import numpy as np

from tsqlora_scale.common.disk_arrays import blocks, new_array
from tsqlora_scale.quality.query.looks import Shape

#: samples at once
ROWS = 2**13


def unit_features(numbers: np.ndarray, shape: Shape, *, pool: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standardised features, every layer's of unit length (but for the root of their number), and what comes with them.

    Args:
        numbers: of samples, as :class:`.FeatureLook` gives them, (n, L R d + 1).
        shape: of these numbers.
        pool: likewise, of the pool, by whose means and deviations features are standardised.

    Returns:
        Features (n, R, L d) float32, whose products of equal regions are mean cosines over the layers; targets or
        losses (n,) float64.
    """
    width = shape.layers * shape.regions * shape.width
    means = pool[:, :width].mean(0, dtype=np.float64)
    squares = sum(np.square(pool[block, :width] - means).sum(0, dtype=np.float64) for block in blocks(len(pool), ROWS))
    deviations = np.sqrt(squares / len(pool)) + 1e-6
    features = new_array(len(numbers) * width, np.float32)
    features = features.reshape(len(numbers), shape.regions, shape.layers * shape.width)
    last = np.empty(len(numbers))
    for block in blocks(len(numbers), ROWS):
        standardised = (numbers[block, :width] - means) / deviations
        layers = standardised.reshape(-1, shape.layers, shape.regions, shape.width)
        lengths = np.maximum(np.linalg.norm(layers, axis=-1, keepdims=True), 1e-12)
        unit = np.swapaxes(layers / lengths / np.sqrt(shape.layers), 1, 2)
        features[block] = unit.reshape(len(unit), shape.regions, -1)
        last[block] = numbers[block, width]
    return features, last
