"""``sampling.selector: rho``: reducible hold-out loss, the label term of the density ratio alone.

Mindermann et al., *Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt*, 2206.07137:
a sample's loss under a model of the pool minus its loss under a model of held-out rows of the wanted task,
``log p_query(y|x) - log p_pool(y|x)``. There both are networks, and the first one is the one in training; here both are
linear heads on the frozen base's hidden states, no row by a head that has seen it, and the choice is made once.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from tsqlora_scale.quality.selectors.by_query import query_rater
from tsqlora_scale.quality.selectors.ranked import RankedSelector, Rating


class RhoSelector(RankedSelector):
    """The answers that the query makes likelier than the pool does. Needs classes or numbers."""

    def rate(self, module: nn.Module) -> Rating:
        """See :class:`~tsqlora_scale.quality.query.query_rater.QueryRater`."""
        found = query_rater(self.context).rate(module)
        terms = {name: found.terms[name] for name in ("log_q", "log_p")}
        return Rating(reducible(terms["log_q"], terms["log_p"]), terms=terms)


def reducible(log_q: np.ndarray, log_p: np.ndarray) -> np.ndarray:
    """Reducible loss (N,) of log-likelihoods under the query's model and the pool's."""
    difference: np.ndarray = log_q - log_p
    return difference
