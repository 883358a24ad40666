"""Where the first order of the loss reduction does in the place of the difference of two forwards.

``eta * grad_norm**2`` is the loss reduction up to O(eta^2), and costs no second forward.
"""

from __future__ import annotations

import numpy as np

#: roundings of the forward's type that a loss reduction must exceed to be told from noise
NOISE_ROUNDINGS = 16
#: Spearman's correlation above which two terms rank the samples alike: the pool's order changes by less than 1 %
ALIKE = 0.99


def first_order_will_do(values: np.ndarray, *, eta: float, rounding: float, by_rank: bool) -> str | None:
    """Why the exact loss reduction need not be measured, in words; None where it is to be.

    Where a step of ``eta`` changes the losses by no more than their rounding, the difference of two forwards is noise,
    and its first order is the better number. With ``by_rank`` it also does where it ranks the samples alike.

    Args:
        values: (n, 3) float64 of a sample of the pool: loss, gradient norm, exact loss reduction.
        eta: the step.
        rounding: machine epsilon of the forward.
        by_rank: whether the ranking counts.
    """
    loss, norm, exact = values[np.isfinite(values).all(1)].T
    if not len(loss):
        return None
    first = eta * norm**2
    spread, noise = float(first.std()), float(NOISE_ROUNDINGS * rounding * np.abs(loss).mean())
    if 0 < spread <= noise:
        return (
            f"loss reductions by a step of scoring.eta={eta:g} (spread {spread:.1e}) are below the rounding of the "
            f"model's losses ({noise:.1e})"
        )
    alike = rank_correlation(first, exact) if by_rank else 0.0
    if alike > ALIKE:
        return f"its first order ranks {len(loss)} samples as the exact loss reduction does (Spearman {alike:.4f})"
    return None


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation of (n,) and (n,), ties at their mean rank; 0 where either does not vary."""
    ranks = np.stack([_mean_ranks(a), _mean_ranks(b)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    lengths = np.sqrt(np.square(ranks).sum(axis=1)).prod()
    return float(ranks.prod(axis=0).sum() / lengths) if lengths > 0 else 0.0


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks
