"""From three raw terms to one quality score and a sampling probability (METHOD 1, Eq. 1 and 2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tsqlora_scale.config import ScoringConfig
from tsqlora_scale.engine.collectives import World

#: (alpha_1, alpha_2, alpha_3) of gradient norm, loss reduction and convergence.
#:
#: ``paper`` is Eq. 1 with equal weights. ``aligned``, the default, leads with the convergence term, because norm and
#: loss reduction are large on mislabelled samples and nearly one term (correlation 0.90 to 0.98). Measured on
#: movie_snippets with 20 % of the labels flipped (MiniLM, r 8, lr 1e-3, batch 32, tau 0.7, alignment, 960 samples,
#: two seeds): sampling mass on the flipped ones, whose share is 0.22,
#:
#: =================  ==============  ===============
#: weights            after 60 steps  after 150 steps
#: =================  ==============  ===============
#: paper              0.34, 0.34      0.39, 0.38
#: (0.2, 0.2, 0.6)    0.21, 0.20      0.31, 0.35
#: (1/6, 1/6, 2/3)    0.19, 0.17      0.30, 0.34
#: (0.1, 0.1, 0.8)    0.15, 0.13      0.29, 0.31
#: (0, 0, 1)          0.12, 0.09      0.28, 0.28
#: =================  ==============  ===============
#:
#: 150 steps are more than one pass over that pool. By then the clean samples' gradients have shrunk, the flipped ones
#: dominate the mean gradient, and no positive weights bring their mass below their share: score early.
PRESETS: dict[str, tuple[float, float, float]] = {"paper": (1 / 3, 1 / 3, 1 / 3), "aligned": (0.1, 0.1, 0.8)}

CLIP = 3.0
#: a spread below this share of the largest value is rounding of float32 losses and gradients, not a difference
NO_SPREAD = 1e-6


def term_weights(scoring: ScoringConfig) -> np.ndarray:
    """(alpha_1, alpha_2, alpha_3): ``scoring.weights``, or those of ``scoring.preset``."""
    return np.asarray(PRESETS[scoring.preset] if scoring.weights is None else scoring.weights, dtype=np.float64)


class Standardisation:
    """z-scores of the three terms, clipped to +-3, with the constants of the first pass.

    A term without spread has z = 0. Its constants are taken from the first pass in which it spreads (``loss_trend``
    has none in the very first pass).

    Attributes:
        mean: (3,) float64.
        std: (3,) float64, population standard deviation; 0 while a term has not shown any spread.
    """

    def __init__(self) -> None:
        self.mean = np.zeros(3)
        self.std = np.zeros(3)

    def fit(self, terms: np.ndarray) -> None:
        """Take the constants that are still missing from finite ``terms`` (n, 3)."""
        std = terms.std(axis=0)
        fresh = (self.std == 0) & (std > NO_SPREAD * np.abs(terms).max(axis=0))
        self.mean = np.where(fresh, terms.mean(axis=0), self.mean)
        self.std = np.where(fresh, std, self.std)

    def z(self, terms: np.ndarray) -> np.ndarray:
        """Standardised and clipped ``terms`` (n, 3)."""
        known = self.std > 0
        scores = np.where(known, (terms - self.mean) / np.where(known, self.std, 1.0), 0.0)
        return np.clip(scores, -CLIP, CLIP)

    def state_dict(self) -> dict[str, Any]:
        """The constants."""
        return {"mean": torch.from_numpy(self.mean.copy()), "std": torch.from_numpy(self.std.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the constants."""
        self.mean, self.std = state["mean"].numpy().copy(), state["std"].numpy().copy()


def log_sum_exp(local: np.ndarray, world: World) -> float:
    """``log(sum_j exp(x_j))`` over all ranks' values, stable: the maximum and the sum are all-reduced. Collective."""
    peak = float(world.max(torch.tensor([local.max(initial=-np.inf)], dtype=torch.float64)))
    assert np.isfinite(peak), "no finite value on any rank"
    total = float(world.sum(torch.tensor([np.exp(local - peak).sum()], dtype=torch.float64)))
    return peak + float(np.log(total))


def softmax(local: np.ndarray, world: World) -> np.ndarray:
    """This rank's part of the softmax over all ranks' values, float64. Collective."""
    return np.exp(local - log_sum_exp(local, world))


def sampling_probabilities(quality: np.ndarray, tau: float, world: World) -> np.ndarray:
    """``exp(Q_i/tau) / sum_j exp(Q_j/tau)`` (Eq. 2) for the whole pool, equal to the bit on every rank. Collective.

    Each rank exponentiates its own contiguous share of ``quality`` (N,).
    """
    bounds = np.linspace(0, len(quality), world.size + 1).astype(int)
    share = quality[bounds[world.rank] : bounds[world.rank + 1]] / tau
    return world.gather_arrays(softmax(share, world))
