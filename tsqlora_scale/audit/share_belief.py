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


def believed(evidence: np.ndarray) -> np.ndarray:
    """Log-evidence (G,) as probabilities of sum 1."""
    weights = np.exp(evidence - evidence.max())
    belief: np.ndarray = weights / weights.sum()
    return belief
