"""Which samples of the pool are trained on (METHOD 1; Algorithm 1, line 4)."""

from __future__ import annotations

import numpy as np

from tsqlora_scale.config import SamplingConfig
from tsqlora_scale.quality.rng import gumbel, philox, share_of


def select_subset(size: int, log_p: np.ndarray | None, sampling: SamplingConfig, *, seed: int) -> np.ndarray:
    """Membership in S, (size,) bool, with ``ceil(keep_fraction * size)`` members (all, for ``selector: full``).

    ``quality`` draws them one after another without replacement, each time by p among those left, which is the same
    as taking the largest ``log p_i + Gumbel_i``. ``random`` draws uniformly.

    Args:
        size: number of samples in the pool.
        log_p: log-probabilities up to a constant, (size,), finite; needed by ``selector: quality`` alone.
        sampling: selector and keep_fraction.
        seed: the same seed and scores give the same subset, on any number of ranks.
    """
    if sampling.selector == "full":
        return np.ones(size, dtype=bool)
    keys = gumbel(philox(seed, "select"), size)
    if sampling.selector == "quality":
        assert log_p is not None
        assert log_p.shape == (size,)
        assert np.isfinite(log_p).all()
        keys = keys + log_p
    keep = share_of(sampling.keep_fraction, size)
    member = np.zeros(size, dtype=bool)
    member[np.argsort(-keys, kind="stable")[:keep]] = True
    return member
