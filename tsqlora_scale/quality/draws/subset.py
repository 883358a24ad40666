"""Which samples of the pool are trained on (Algorithm 1, line 4)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from tsqlora_scale.common.disk_arrays import blocks, counts, filled, new_array, positions, taken
from tsqlora_scale.common.random_streams import gumbel, philox
from tsqlora_scale.config.schema import SamplingConfig
from tsqlora_scale.quality.draws.key_order import largest, stratum_of

if TYPE_CHECKING:
    from tsqlora_scale.quality.scores.score_table import ScoreTable


def select_subset(
    size: int,
    log_p: np.ndarray | None,
    sampling: SamplingConfig,
    *,
    seed: int,
    strata: np.ndarray | None = None,
    always: int = 0,
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
        always: samples at the pool's end that belong to S whatever they are, beside those counted.
    """
    if always:
        whole = filled(size, bool, True)
        rest = slice(0, size - always)
        whole[rest] = select_subset(
            size - always,
            None if log_p is None else log_p[rest],
            sampling,
            seed=seed,
            strata=None if strata is None else strata[rest],
        )
        return whole
    if sampling.selector == "full":
        return filled(size, bool, True)
    keys = gumbel(philox(seed, "select"), size)
    if sampling.selector == "quality":
        assert log_p is not None
        assert log_p.shape == (size,)
        assert all(np.isfinite(log_p[block]).all() for block in blocks(size))
        np.add(keys, log_p, out=keys)
    sizes = np.array([size]) if strata is None else counts(strata)
    return largest(keys, quotas(sizes, share_of(sampling.most_kept, size)), strata)


def share_of(fraction: float, total: int) -> int:
    """``ceil(fraction * total)`` with the fraction as written: 0.07 of 100 is 7, though 0.07 * 100 > 7 in floats."""
    return math.ceil(Fraction(repr(float(fraction))) * total)


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
    scaled = new_array(len(weights), np.float64)
    if strata is None:
        np.divide(weights, weights.sum(), out=scaled)
        return scaled
    found, masses = np.zeros(len(sizes), dtype=np.int64), np.zeros(len(sizes))
    for block in blocks(len(weights)):
        group = stratum_of(strata, block)
        found += np.bincount(group, minlength=len(sizes))
        np.add.at(masses, group, weights[block])  # one after another, however the blocks are cut
    mass = np.where(found > 0, sizes, 0)  # a stratum without a place in S
    scale = mass / mass.sum() / np.maximum(masses, np.finfo(float).tiny)
    for block in blocks(len(weights)):
        scaled[block] = weights[block] * scale[stratum_of(strata, block)]
    return scaled


def draws_of(table: ScoreTable, strata: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Pool indices of a table's S, and the probabilities (sum 1) by which minibatches are drawn from them.

    Args:
        strata: of the pool, (N,), each of which keeps its share; None is one group.
    """
    sizes = np.array([len(table)]) if strata is None else counts(strata)
    of_members = None if strata is None else taken(strata, table.selected)
    return positions(table.selected), renormalised(taken(table.probability, table.selected), of_members, sizes)


def importance_weights(probabilities: np.ndarray, cut: float) -> np.ndarray:
    """``1 / (n p_i)``, (n,), no larger than ``cut``: weights with which draws by p estimate the uniform mean.

    Args:
        probabilities: of the samples drawn from, (n,), of sum 1.
    """
    weights = new_array(len(probabilities), np.float64)
    np.multiply(probabilities, len(probabilities), out=weights)
    with np.errstate(divide="ignore"):
        np.divide(1.0, weights, out=weights)
    np.minimum(weights, cut, out=weights)
    return weights


def loss_weights(probabilities: np.ndarray, cut: float) -> np.ndarray:
    """``n p_i``, (n,), no larger than ``cut``: weights with which even draws have the mean by p.

    Args:
        probabilities: (n,), of sum 1.
    """
    weights = new_array(len(probabilities), np.float64)
    np.multiply(probabilities, len(probabilities), out=weights)
    np.minimum(weights, cut, out=weights)
    return weights
