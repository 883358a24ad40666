"""Which samples of the pool are trained on (METHOD 1; Algorithm 1, line 4)."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from tsqlora_scale.config import SamplingConfig
from tsqlora_scale.quality.rng import gumbel, philox, share_of


def select_subset(
    size: int, log_p: np.ndarray | None, sampling: SamplingConfig, *, seed: int, strata: np.ndarray | None = None
) -> np.ndarray:
    """Membership in S, (size,) bool, with ``ceil(keep_fraction * size)`` members (all, for ``selector: full``).

    ``quality`` draws them one after another without replacement, each time by p among those left, which is the same
    as taking the largest ``log p_i + Gumbel_i``. ``random`` draws uniformly.

    Args:
        size: number of samples in the pool.
        log_p: log-probabilities up to a constant, (size,), finite; needed by ``selector: quality`` alone.
        sampling: selector and keep_fraction.
        seed: the same seed and scores give the same subset, on any number of ranks.
        strata: groups of the pool, (size,) numbers from 0, of which S keeps the shares; None is one group.
    """
    if sampling.selector == "full":
        return np.ones(size, dtype=bool)
    keys = gumbel(philox(seed, "select"), size)
    if sampling.selector == "quality":
        assert log_p is not None
        assert log_p.shape == (size,)
        assert np.isfinite(log_p).all()
        keys = keys + log_p
    strata = np.zeros(size, dtype=np.int64) if strata is None else strata
    quota = quotas(np.bincount(strata), share_of(sampling.keep_fraction, size))
    order = np.lexsort((-keys, strata))  # stratum by stratum, the largest keys first
    place = np.arange(size) - (np.cumsum(np.bincount(strata)) - np.bincount(strata))[strata[order]]
    member = np.zeros(size, dtype=bool)
    member[order[place < quota[strata[order]]]] = True
    return member


def quotas(sizes: np.ndarray, total: int) -> np.ndarray:
    """``total`` places among strata of ``sizes`` by their shares, largest remainders first, ties to the earlier."""
    exact = [Fraction(int(size) * total, int(sizes.sum())) for size in sizes]
    given = np.array([int(share) for share in exact], dtype=np.int64)
    by_remainder = sorted(range(len(sizes)), key=lambda s: (int(exact[s]) - exact[s], s))
    given[by_remainder[: total - int(given.sum())]] += 1
    return given


def renormalised(weights: np.ndarray, strata: np.ndarray | None, sizes: np.ndarray) -> np.ndarray:
    """``weights`` (n,) of the samples of S, scaled to the sum 1, in which a stratum has its share of the pool.

    Args:
        strata: of the samples, (n,); None is one group.
        sizes: samples of the pool in every stratum.
    """
    if strata is None:
        whole: np.ndarray = weights / weights.sum()
        return whole
    mass = np.where(np.bincount(strata, minlength=len(sizes)) > 0, sizes, 0)  # a stratum without a place in S
    scale = mass / mass.sum() / np.maximum(np.bincount(strata, weights, minlength=len(sizes)), np.finfo(float).tiny)
    scaled: np.ndarray = weights * scale[strata]
    return scaled


def importance_weights(probabilities: np.ndarray, largest: float) -> np.ndarray:
    """``1 / (n p_i)``, (n,), cut at ``largest``: weights with which draws by p estimate the uniform mean.

    Args:
        probabilities: of the samples drawn from, (n,), of sum 1.
    """
    with np.errstate(divide="ignore"):
        weights: np.ndarray = np.minimum(1.0 / (len(probabilities) * probabilities), largest)
    return weights
