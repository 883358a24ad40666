"""Exact weighted draws with replacement from pools of any size."""

from __future__ import annotations

import numpy as np

from tsqlora_scale.common.disk_arrays import blocks, new_array

#: Attempts of a draw within its class; each fails with probability at most 1/2.
ATTEMPTS = 40


class DyadicClasses:
    """Weighted draws with replacement that hardly depend on the weights' last digits.

    Samples are put into classes by the power of two of their weight; a draw chooses a class by its total and then,
    within the class, proposes uniformly and accepts by the weight (at least half of the largest there). Exact, O(n)
    to set up and O(1) a draw. Ranks and engines compute scores that differ by rounding; by inverse CDF every draw
    would depend on the sum of all weights before it, and two equal runs soon drew different samples. Here a draw
    changes only if rounding moves its own few comparisons.

    The classes take 16 bytes a weight, in columns that are mapped to disk where they are large.

    Args:
        weights: (n,), finite and nonnegative, not all zero.
    """

    def __init__(self, weights: np.ndarray) -> None:
        largest = float(weights.max())
        counts: dict[int, int] = {}
        for block in blocks(len(weights)):
            exponents, found = np.unique(self._exponents(weights[block], largest)[1], return_counts=True)
            for exponent, count in zip(exponents.tolist(), found.tolist(), strict=True):
                counts[exponent] = counts.get(exponent, 0) + count
        descending = sorted(counts, reverse=True)  # the heaviest class first
        self._sizes = np.array([counts[exponent] for exponent in descending], dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        total = int(self._sizes.sum())
        self._members = new_array(total, np.int64)
        # the weight relative to its class's upper end, in [1/2, 1)
        self._accept = new_array(total, np.float64)
        ends = dict(zip(descending, self._starts.tolist(), strict=True))
        sums = dict.fromkeys(descending, 0.0)
        for block in blocks(len(weights)):
            scaled, exponents = self._exponents(weights[block], largest)
            drawable = np.flatnonzero(scaled > 0)
            scaled = scaled[drawable]
            for exponent in np.unique(exponents).tolist():
                mine = exponents == exponent
                place = slice(ends[exponent], ends[exponent] + int(mine.sum()))
                self._members[place] = drawable[mine] + block.start
                self._accept[place] = np.ldexp(scaled[mine], -exponent)
                ends[exponent] = place.stop
                sums[exponent] += float(scaled[mine].sum())
        totals = np.array([sums[exponent] for exponent in descending])
        self._cumulative = np.cumsum(totals) / totals.sum()

    @staticmethod
    def _exponents(weights: np.ndarray, largest: float) -> tuple[np.ndarray, np.ndarray]:
        """Weights relative to the largest, and e of those that are not zero: w in [2^(e-1), 2^e)."""
        scaled = np.asarray(weights, dtype=np.float64) / largest
        return scaled, np.frexp(scaled[scaled > 0])[1]

    def draw(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Positions (count,) among the weights.

        Every attempt takes random numbers for all draws, accepted or not: no draw depends on how others went.
        """
        classes = np.searchsorted(self._cumulative, generator.random(count), side="right")
        classes = np.minimum(classes, len(self._sizes) - 1)
        sizes, starts = self._sizes[classes], self._starts[classes]
        places = np.empty(count, dtype=np.int64)
        waiting = np.arange(count)
        for attempt in range(ATTEMPTS):
            propose, accept = generator.random((2, count))[:, waiting]
            candidates = starts[waiting] + np.minimum((propose * sizes[waiting]).astype(np.int64), sizes[waiting] - 1)
            if attempt == 0:  # stands where no attempt is accepted, with a probability of 2^-40
                places[:] = candidates
            accepted = accept < self._accept[candidates]
            places[waiting[accepted]] = candidates[accepted]
            waiting = waiting[~accepted]
            if len(waiting) == 0:
                break
        drawn: np.ndarray = np.asarray(self._members[places])
        return drawn
