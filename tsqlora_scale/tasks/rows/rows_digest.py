"""What the rows of a split are known by, so that a run goes on with the same ones."""

from __future__ import annotations

import hashlib

import datasets
import numpy as np

from tsqlora_scale.common.disk_arrays import blocks
from tsqlora_scale.tasks.rows.mixed_sets import MixedSets


def rows_digest(view: datasets.Dataset, sets: MixedSets | None, weights: np.ndarray | None) -> str:
    """A digest of every row's columns, in order.

    Args:
        view: the columns that count.
        sets: of a mixture that the rows are of.
        weights: of the draws, (N,) float64.
    """
    digest = hashlib.sha256()
    for rows in view.iter(batch_size=10_000):
        for name in view.column_names:
            digest.update(repr(rows[name]).encode())
    if sets is not None:
        digest.update(repr(sets.names).encode())
        for block in blocks(len(sets.numbers)):
            digest.update(sets.numbers[block].tobytes())
    if weights is not None:
        for block in blocks(len(weights)):
            digest.update(weights[block].tobytes())
    return digest.hexdigest()
