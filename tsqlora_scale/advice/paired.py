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

    def rounded(self) -> list[float]:
        """Mean and ends, for a file."""
        return [round(self.mean, 4), round(self.low, 4), round(self.high, 4)]


@dataclass(frozen=True)
class Gain:
    """What one way has over another: of log-likelihood in ``nats`` a row and, of classes, of accuracy in ``points``.

    Either alone misleads: confidence that is set anew hides from the one that a way is hardly better than chance, and
    the other has few rows to count. So a gain is plain if either interval is on one side and no mean is on the other.
    """

    nats: Difference
    points: Difference | None = None

    @property
    def is_above(self) -> bool:
        """Whether there plainly is a gain."""
        return self.leans_up and any(each.low > 0 for each in self._each())

    @property
    def is_below(self) -> bool:
        """Whether there plainly is a loss."""
        return self.turned().is_above

    def turned(self) -> Gain:
        """What the other way has over the one."""
        return Gain(*(Difference(-each.mean, -each.high, -each.low) for each in self._each()))

    @property
    def leans_up(self) -> bool:
        """Whether a gain is likelier than a loss."""
        means = [each.mean for each in self._each()]
        return min(means) >= 0 and max(means) > 0

    def _each(self) -> list[Difference]:
        return [self.nats] if self.points is None else [self.nats, self.points]


def drawn_rows(size: int, *, seed: int) -> np.ndarray:
    """The rows of every resample, (:data:`RESAMPLES`, size), with replacement."""
    return philox(seed, "paired differences").integers(0, size, (RESAMPLES, size))


def resampled_means(values: np.ndarray, *, seed: int) -> np.ndarray:
    """Means of the resamples of values (n,), (:data:`RESAMPLES`,): every row counts as often as it is drawn."""
    means: np.ndarray = values[drawn_rows(len(values), seed=seed)].mean(axis=1)
    return means
