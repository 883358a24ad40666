"""How sure a mean difference between two ways is, judged on the same rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tsqlora_scale.common.random_streams import philox

#: Resamples, and the probability with which the interval is to hold the mean.
RESAMPLES, LEVEL = 4000, 0.9


@dataclass(frozen=True)
class Difference:
    """A mean difference and its interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def paired(cls, ours: np.ndarray, theirs: np.ndarray, *, seed: int) -> Difference:
        """Of what two ways have on the same rows, (n,) each: percentile bootstrap over rows.

        The interval says nothing of other pools and other queries: only of the rows that judge.
        """
        differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
        means = resampled_means(differences, seed=seed)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return cls(float(differences.mean()), float(low), float(high))

    @property
    def is_above(self) -> bool:
        """Whether all of the interval is above 0."""
        return self.low > 0

    @property
    def is_below(self) -> bool:
        """Whether all of the interval is below 0."""
        return self.high < 0

    def rounded(self) -> list[float]:
        """Mean and ends, for a file."""
        return [round(self.mean, 4), round(self.low, 4), round(self.high, 4)]


def drawn_rows(size: int, *, seed: int) -> np.ndarray:
    """The rows of every resample, (:data:`RESAMPLES`, size), with replacement."""
    return philox(seed, "paired differences").integers(0, size, (RESAMPLES, size))


def resampled_means(values: np.ndarray, *, seed: int) -> np.ndarray:
    """Means of the resamples of values (n,), (:data:`RESAMPLES`,): every row counts as often as it is drawn."""
    means: np.ndarray = values[drawn_rows(len(values), seed=seed)].mean(axis=1)
    return means
