"""What is done to whole pools, plainly: the columns in memory, orders by sorting."""

from __future__ import annotations

import numpy as np


def largest(keys: np.ndarray, quota: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Membership of the ``quota[s]`` largest keys of every stratum, of equal ones the earlier, by a sort."""
    order = np.lexsort((-keys, strata))  # stratum by stratum, the largest keys first
    sizes = np.bincount(strata, minlength=len(quota))
    place = np.arange(len(keys)) - (np.cumsum(sizes) - sizes)[strata[order]]
    member = np.zeros(len(keys), dtype=bool)
    member[order[place < quota[strata[order]]]] = True
    return member


def gumbel(generator: np.random.Generator, size: int) -> np.ndarray:
    """Standard Gumbel noise, in one piece."""
    return -np.log(-np.log(np.clip(generator.random(size), np.finfo(np.float64).tiny, None)))
