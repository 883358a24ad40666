"""How sure means over seeds are: bootstrap intervals and paired tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tsqlora_scale.common.random_streams import philox

RESAMPLES = 10_000
#: Up to so many seeds all signs are tried; with more, :data:`RESAMPLES` random ones.
ALL_SIGNS = 12


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; NaN where there is none."""

    value: float
    low: float
    high: float


def interval(
    samples: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap over seeds.

    Args:
        samples: (seeds, ...) what was measured with each seed; seeds are drawn with replacement, whole rows.
        statistic: of (resamples, seeds, ...), (resamples,).

    Returns:
        The ends, NaN with fewer than two seeds, or where more resamples than an end leaves out have no value. With five
        seeds such an interval is rather too narrow than too wide.
    """
    size = len(samples)
    if size < 2:
        return float("nan"), float("nan")
    drawn = philox(0, "comparison").integers(0, size, (RESAMPLES, size))
    values = statistic(samples[drawn])
    finite = np.isfinite(values)
    if (~finite).mean() > (1 - level) / 2:
        return float("nan"), float("nan")
    values = values[finite]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean of one value a seed, and its interval."""
    samples = np.asarray(values, dtype=np.float64)
    return Estimate(float(samples.mean()), *interval(samples, lambda drawn: drawn.mean(axis=1)))


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p of a sign-flip permutation test: how often a mean at least as far from 0 would be seen if each
    seed's difference were as likely to have the other sign (Fisher's randomisation test for pairs).

    Exact up to :data:`ALL_SIGNS` seeds. The smallest value with n seeds is 2 / 2**n: 0.0625 with five.

    Returns:
        NaN with fewer than two seeds, or where a difference is none.
    """
    values = np.asarray(differences, dtype=np.float64)
    size = len(values)
    if size < 2 or not np.isfinite(values).all():
        return float("nan")
    if size <= ALL_SIGNS:
        bits = np.arange(2**size)[:, None] >> np.arange(size)
        signs = 1.0 - 2.0 * (bits & 1)
    else:
        signs = 1.0 - 2.0 * philox(0, "comparison", 1).integers(0, 2, (RESAMPLES, size))
        signs[0] = 1.0  # what was seen is one of the arrangements
    means = np.abs(signs @ values)
    return float((means >= abs(values.sum()) * (1 - 1e-12) - 1e-15).mean())
