"""From three raw terms to one quality score and a sampling probability (paper 2.1, Eq. 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from tsqlora_scale.common.disk_arrays import allocate, blocks, counts
from tsqlora_scale.config.schema import ScoringConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality.draws.key_order import stratum_of

#: (alpha_1, alpha_2, alpha_3) of gradient norm, loss reduction and convergence.
#:
#: ``paper`` is Eq. 1 with equal weights. ``aligned``, the default, leads with the convergence term, because norm and
#: loss reduction are large on mislabelled samples and nearly one term (correlation 0.90 to 0.98). Measured on
#: movie_snippets with 20 % of the labels flipped (MiniLM, r 8, lr 1e-3, batch 32, tau 0.7, 960 samples, draws
#: stratified by label, two seeds): sampling mass on the flipped ones, whose share is 0.22,
#:
#: ===============  =============  ==============  ===============
#: weights          mean gradient  after 60 steps  after 150 steps
#: ===============  =============  ==============  ===============
#: paper            plain          0.39, 0.29      0.40, 0.41
#: paper            unit           0.31, 0.28      0.29, 0.29
#: (0.1, 0.1, 0.8)  plain          0.16, 0.12      0.33, 0.31
#: (0.1, 0.1, 0.8)  unit           0.10, 0.10      0.10, 0.09
#: (0, 0, 1)        plain          0.12, 0.08      0.30, 0.27
#: (0, 0, 1)        unit           0.07, 0.07      0.07, 0.06
#: ===============  =============  ==============  ===============
#:
#: 150 steps are more than one pass over that pool. By then the clean samples' gradients have shrunk and the flipped
#: ones dominate the plain mean; in the mean of gradients of unit length they stay a minority.
#:
#: Little mass on wrong labels is not yet a better model. Preferring what agrees with the mean leaves fewer samples in
#: effect (900 to 2,700 of 4,000) and takes hard ones out with the wrong ones. So by default the term is a gate: it
#: counts against samples that pull against the mean, and is equal for all others (2,800 to 3,500 in effect). Accuracy
#: on 1,000 sentences, movie_snippets, 4,000 samples, 160 steps, ranks fixed, first-order scores refreshed six times,
#: two seeds (``benchmarks/noise.py train``):
#:
#: ============================  =====================  =====================
#: draws                         clean labels           20 % flipped
#: ============================  =====================  =====================
#: uniform (``method: lora``)    0.821 (0.828, 0.813)   0.802 (0.804, 0.799)
#: (0.1, 0.1, 0.8), linear       0.802 (0.799, 0.805)   0.757 (0.770, 0.744)
#: (0.1, 0.1, 0.8), gate         0.828 (0.825, 0.831)   0.780 (0.778, 0.781)
#: ============================  =====================  =====================
PRESETS: dict[str, tuple[float, float, float]] = {"paper": (1 / 3, 1 / 3, 1 / 3), "aligned": (0.1, 0.1, 0.8)}

CLIP = 3.0
#: values that are summed up at once
BLOCK = 2**16
#: a spread below this share of the largest value is rounding of float32 losses and gradients, not a difference
NO_SPREAD = 1e-6


def term_weights(scoring: ScoringConfig) -> np.ndarray:
    """(alpha_1, alpha_2, alpha_3): ``scoring.weights``, or those of ``scoring.preset``."""
    return np.asarray(PRESETS[scoring.preset] if scoring.weights is None else scoring.weights, dtype=np.float64)


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
        variance = mean_of((some - mean) ** 2 for some in terms())
        largest = np.max([np.abs(some).max(axis=0, initial=0) for some in terms()], axis=0)
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
    for some in rows:  # the rows are added one after another, as numpy does along the first axis
        total = np.add.reduce(some if total is None else np.concatenate([total[None], some]), axis=0)
        size += len(some)
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
        of = stratum_of(strata, cut[number])
        sums[number] = np.bincount(of, np.exp(values[cut[number]] - peaks[of]), minlength=count)
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
        log_p = allocate(len(quality), np.float64)
    np.divide(quality, tau, out=log_p)
    shifts = np.log(sizes / len(quality)) - log_sum_exp(log_p, strata, len(sizes), world)
    for block in blocks(len(log_p)):
        log_p[block] += shifts[stratum_of(strata, block)]
    return log_p
