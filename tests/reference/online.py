"""Averages over visits as docs/method.md has them: every number kept, and averaged at the end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def averages(size: int, steps: Sequence[tuple[Sequence[int], np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Means of the visits with finite numbers, (size, k), NaN where there was none; and how many there were, (size,).

    Args:
        steps: rows of the pool, repeats allowed, and their numbers (n, k), step by step.
    """
    visits: list[list[np.ndarray]] = [[] for _ in range(size)]
    for rows, values in steps:
        for row, value in zip(rows, values, strict=True):
            if np.isfinite(value).all():
                visits[row].append(value)
    width = steps[0][1].shape[1]
    means = [np.mean(found, axis=0) if found else np.full(width, np.nan) for found in visits]
    return np.stack(means), np.array([len(found) for found in visits])
