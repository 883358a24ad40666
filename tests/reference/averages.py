"""Averages of adapters and distances of logits, the slow and obvious way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mean_product(pairs: Sequence[tuple[np.ndarray, np.ndarray]], rank: int) -> np.ndarray:
    """The matrix of ``rank`` nearest to the mean of B A, (d_out, d_in), by a whole SVD of it."""
    mean = sum(b.astype(np.float64) @ a.astype(np.float64) for a, b in pairs) / len(pairs)
    u, s, vh = np.linalg.svd(mean)
    result = np.zeros_like(mean)
    for k in range(min(rank, len(s))):
        result += s[k] * np.outer(u[:, k], vh[k])
    return result


def sample_gaps(logits: np.ndarray, others: np.ndarray, targets: np.ndarray, ignored: int) -> list[float]:
    """Of every sample, over its targets, the mean squared difference of logits (B, T, V), summed."""
    found = []
    for row in range(len(targets)):
        total = 0.0
        for place in range(targets.shape[1]):
            if targets[row, place] != ignored:
                total += float(((logits[row, place] - others[row, place]) ** 2).mean())
        found.append(total)
    return found
