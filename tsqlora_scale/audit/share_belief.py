"""What is believed of the share of wrong labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ShareBelief:
    """Flip rates that were weighed, and what each would mean.

    Attributes:
        rates: the rates, (G,).
        belief: how probable each is, (G,), of sum 1.
        shares: the share of wrong labels under each, (G,).
    """

    rates: np.ndarray
    belief: np.ndarray
    shares: np.ndarray

    @property
    def share(self) -> float:
        """The share of wrong labels that is expected."""
        return float(self.belief @ self.shares)

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """Between which shares the right one lies with probability ``level``."""
        order = np.argsort(self.shares, kind="stable")
        reached = np.cumsum(self.belief[order])
        ends = np.searchsorted(reached, [(1 - level) / 2, (1 + level) / 2]).clip(max=len(order) - 1)
        low, high = self.shares[order][ends]
        return float(low), float(high)


#: of the log-likelihood, as the model of right labels is not exact: with all of it, intervals were too narrow
TEMPER = 0.5
#: of the exponential prior of the rate
PRIOR_MEAN = 0.5


def believed(likelihood: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """How probable each rate of a grid is, (G,) of sum 1, by the log-likelihood (G,) at it and the prior.

    Args:
        rates: ascending; one stands for its surroundings.
    """
    evidence = TEMPER * likelihood - rates / PRIOR_MEAN + np.log(np.gradient(rates))
    weights = np.exp(evidence - evidence.max())
    belief: np.ndarray = weights / weights.sum()
    return belief
