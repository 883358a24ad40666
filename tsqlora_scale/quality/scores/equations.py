"""Eq. 1 and 2 of the paper: from three raw terms to one quality, and from that to a sampling probability (2.1).

:func:`equation_1` and :func:`equation_2` say what is meant; :func:`quality` and :func:`log_probabilities` compute it
over a pool of any size, in blocks, on any number of ranks, with constants that are kept from pass to pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from tsqlora_scale.common.disk_arrays import blocks, counts, new_array
from tsqlora_scale.config.schema import ScoringConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality.draws.key_order import stratum_of

#: (alpha_1, alpha_2, alpha_3) of gradient norm, loss reduction and convergence.
#:
#: ``paper`` is Eq. 1 with equal weights. ``aligned``, the default, leads with the convergence term, because norm and
#: loss reduction are large on mislabelled samples and nearly one term (correlation 0.90 to 0.98); see
#: docs/results.md, "Weights of the terms".
TERM_WEIGHTS: dict[str, tuple[float, float, float]] = {"paper": (1 / 3, 1 / 3, 1 / 3), "aligned": (0.1, 0.1, 0.8)}

CLIP = 3.0
#: values that are summed up at once
BLOCK = 2**16
#: a spread below this share of the largest value is rounding of float32 losses and gradients, not a difference
NO_SPREAD = 1e-6


def term_weights(scoring: ScoringConfig) -> np.ndarray:
    """(alpha_1, alpha_2, alpha_3): ``scoring.weights``, or those of ``scoring.preset``."""
    return np.asarray(TERM_WEIGHTS[scoring.preset] if scoring.weights is None else scoring.weights, dtype=np.float64)


def equation_1(terms: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Eq. 1 to the letter: ``Q_i = alpha_1 z(G_i) + alpha_2 z(dL_i) + alpha_3 z(dC_i)``, (n,) float64.

    The reference of :class:`Standardisation` and :func:`quality`, of one pass without a gate, in memory.

    Args:
        terms: gradient norm, loss reduction and convergence of the samples, (n, 3), finite.
        weights: (alpha_1, alpha_2, alpha_3).
    """
    z = (terms - terms.mean(axis=0)) / terms.std(axis=0)
    scores: np.ndarray = np.clip(z, -CLIP, CLIP) @ weights
    return scores


def equation_2(qualities: np.ndarray, tau: float) -> np.ndarray:
    """Eq. 2 to the letter: ``p_i = exp(Q_i / tau) / sum_j exp(Q_j / tau)``, (n,) float64.

    The reference of :func:`log_probabilities`, of one stratum, on one rank, in memory.
    """
    scores = np.exp(qualities / tau)
    shares: np.ndarray = scores / scores.sum()
    return shares


def quality(terms: np.ndarray, standardisation: Standardisation, weights: np.ndarray) -> np.ndarray:
    """Q (n,) of raw terms (n, 3): Eq. 1 with the constants of the first pass, and with the gate if there is one."""
    scores: np.ndarray = standardisation.z(terms) @ weights
    return scores


class Standardisation:
    """z-scores of the three terms, clipped to +-3, with the constants of the first pass.

    A term without spread has z = 0. Its constants are taken from the first pass in which it spreads (``loss_trend``
    has none in the very first pass).

    Args:
        gate: the convergence term counts against samples that pull against the others (below 0), and for none.

    Attributes:
        mean: (3,) float64.
        std: (3,) float64, population standard deviation; 0 while a term has not shown any spread.
    """

    def __init__(self, *, gate: bool = False) -> None:
        self.gate = gate
        self.mean = np.zeros(3)
        self.std = np.zeros(3)

    def fit(self, terms: Callable[[], Iterable[np.ndarray]]) -> None:
        """Take the constants that are still missing from finite terms (n, 3).

        They are given in blocks of rows, at least one row in all, the same at every call. The sums go on
        from block to block, so the constants are the same to the bit however the rows are cut.
        """
        mean = mean_of(terms())
        variance = mean_of((block - mean) ** 2 for block in terms())
        largest = np.max([np.abs(block).max(axis=0, initial=0) for block in terms()], axis=0)
        std = np.sqrt(variance)
        fresh = (self.std == 0) & (std > NO_SPREAD * largest)
        self.mean = np.where(fresh, mean, self.mean)
        self.std = np.where(fresh, std, self.std)

    def z(self, terms: np.ndarray) -> np.ndarray:
        """Standardised and clipped ``terms`` (n, 3)."""
        known = self.std > 0
        scores = np.where(known, (terms - self.mean) / np.where(known, self.std, 1.0), 0.0)
        if self.gate and known[2]:
            scores[:, 2] = np.minimum(terms[:, 2], 0.0) / self.std[2]
        return np.clip(scores, -CLIP, CLIP)

    def state_dict(self) -> dict[str, Any]:
        """The constants."""
        return {"mean": torch.from_numpy(self.mean.copy()), "std": torch.from_numpy(self.std.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the constants."""
        self.mean, self.std = state["mean"].numpy().copy(), state["std"].numpy().copy()


def mean_of(rows: Iterable[np.ndarray]) -> np.ndarray:
    """Mean (k,) of rows that are given in blocks (n, k); ``np.mean(..., axis=0)`` of all of them, to the bit."""
    total: np.ndarray | None = None
    size = 0
    for block in rows:  # the rows are added one after another, as numpy does along the first axis
        total = np.add.reduce(block if total is None else np.concatenate([total[None], block]), axis=0)
        size += len(block)
    assert total is not None and size > 0
    mean: np.ndarray = total / size
    return mean


def log_sum_exp(values: np.ndarray, strata: np.ndarray | None, count: int, world: World) -> np.ndarray:
    """``log(sum_j exp(x_j))`` within every stratum, stable, equal to the bit on any number of ranks. Collective.

    The ranks exponentiate blocks of :data:`BLOCK` values in turn. The maxima and the blocks' sums are all-reduced,
    each as one array, and the sums are then added up in the blocks' order.

    Args:
        values: (n,) finite, the same on every rank.
        strata: the stratum of each, (n,), from 0 to ``count - 1``; None is one stratum.

    Returns:
        (count,) float64; ``-inf`` for a stratum without a value.
    """
    cut = list(blocks(len(values), BLOCK))
    mine = range(world.rank, len(cut), world.size)
    peaks = np.full(count, -np.inf)
    for number in mine:
        assert np.isfinite(values[cut[number]]).all()
        np.maximum.at(peaks, stratum_of(strata, cut[number]), values[cut[number]])
    peaks = world.max(torch.from_numpy(peaks)).numpy()
    sums = np.zeros((len(cut), count))
    for number in mine:
        group = stratum_of(strata, cut[number])
        sums[number] = np.bincount(group, np.exp(values[cut[number]] - peaks[group]), minlength=count)
    sums = world.sum(torch.from_numpy(sums)).numpy()
    with np.errstate(divide="ignore"):  # an empty stratum: log 0
        total: np.ndarray = peaks + np.log(sums.sum(axis=0))
    return total


def log_probabilities(quality: np.ndarray, tau: float, world: World, strata: np.ndarray | None = None) -> np.ndarray:
    """``log p`` of the whole pool (N,), equal to the bit on every rank and on any number of them. Collective.

    Eq. 2 is ``p_i = exp(Q_i/tau) / sum_j exp(Q_j/tau)``, the sum over the pool. With ``strata``, (N,) numbers from 0,
    it holds within each stratum, and a stratum has as much of the mass as it has of the samples.

    Args:
        quality: Q of the whole pool, (N,), the same on every rank.

    Raises:
        UserError: the disk of TMPDIR has no room, on any rank.
    """
    sizes = np.array([len(quality)]) if strata is None else counts(strata)
    with world.together():
        log_p = new_array(len(quality), np.float64)
    np.divide(quality, tau, out=log_p)
    shifts = np.log(sizes / len(quality)) - log_sum_exp(log_p, strata, len(sizes), world)
    for block in blocks(len(log_p)):
        log_p[block] += shifts[stratum_of(strata, block)]
    return log_p
