"""Choices in turn: every row of a query takes the best of the pool that is still there."""

from __future__ import annotations

import numpy as np

from tsqlora_scale.common.disk_arrays import new_array


def in_turn(likeness: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` rows that the query's rows take in turn, (count,) int64, in that order.

    Round-robin, as Ivison et al. (2503.01807) choose: a query of several kinds of rows gets its best of each, where a
    mean over its rows would prefer what is somewhat like all of them.

    Args:
        likeness: of the pool's rows to the query's, (N, Q), no NaN; of equal ones the earlier row is taken.
        count: at most N.
    """
    size, turns = likeness.shape
    orders = new_array(turns * count, np.int64).reshape(turns, count)
    for row in range(turns):  # no row of the query can come to more than its ``count`` best
        orders[row] = np.argsort(-likeness[:, row], kind="stable")[:count]
    taken = np.zeros(size, dtype=bool)
    places = [0] * turns
    picks = np.empty(count, dtype=np.int64)
    for number in range(count):
        row = number % turns
        while taken[orders[row, places[row]]]:
            places[row] += 1
        picks[number] = orders[row, places[row]]
        taken[picks[number]] = True
    return picks


def rated_by_turns(likeness: np.ndarray, count: int) -> np.ndarray:
    """Ratings (N,) float64: those that are taken above all others, earlier picks above later ones; the others by their
    likeness to the row of the query that is nearest.

    Args:
        likeness: (N, Q), within [-1, 1].
    """
    ratings: np.ndarray = likeness.max(1).astype(np.float64)
    ratings[in_turn(likeness, count)] = 2 + np.arange(count, 0, -1) / max(count, 1)
    return ratings
