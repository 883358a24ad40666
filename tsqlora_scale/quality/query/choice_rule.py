"""What a rated pool is chosen by: how many rows, how often each is drawn, and the classes' shares."""

from __future__ import annotations

import numpy as np

from tsqlora_scale.common.disk_arrays import filled, new_array
from tsqlora_scale.quality.query.density_ratio import Standing, surer_part

#: Rows of every class that are added to the query's before its shares are taken: few rows say little of them.
PRIOR = 2


def kept_rows(standing: Standing, size: int, *, least: int) -> int:
    """Rows of ``size`` to keep: the surer part of what is wanted, not fewer than ``least``; all without evidence."""
    if not standing.is_evident:
        return size
    return min(size, max(round(surer_part(standing.share) * size), least))


def wanted_probability(log_ratio: np.ndarray, standing: Standing) -> np.ndarray:
    """The probability that a row is wanted, (N,), ``min(1, pi q / p)`` of its log ratio; 1 without evidence."""
    if not standing.is_evident:
        return filled(len(log_ratio), np.float64, 1.0)
    likely = new_array(len(log_ratio), np.float64)
    np.minimum(log_ratio + np.log(max(standing.share, 1e-3)), 0.0, out=likely)
    np.exp(likely, out=likely)
    return likely


def class_shares(wanted: np.ndarray, classes: int) -> np.ndarray:
    """Shares of classes in S up to a constant, (classes or more,): those of the query's class ids ``wanted`` (n,)."""
    return np.bincount(wanted, minlength=classes) + float(PRIOR)
