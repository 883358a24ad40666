"""What the selectors that score the pool have in common: draws from S by p, and what they depend on."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from tsqlora_scale.quality.scores.score_table import ScoreTable
from tsqlora_scale.quality.selectors.full import FullSelector
from tsqlora_scale.quality.selectors.selector import SelectorContext


class Scorer(Protocol):
    """Whoever knows the scores of a pool."""

    @property
    def table(self) -> ScoreTable | None:
        """None as long as there are none."""
        ...

    def draws(self) -> tuple[np.ndarray, np.ndarray]:
        """Pool indices of S, and the probabilities (sum 1) by which minibatches are drawn from them."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that changes."""
        ...


class ScoredSelector(FullSelector):
    """Draws evenly until there are scores, then from S by p.

    Args:
        context: see :class:`.SelectorContext`.
        scorer: where the scores come from.
    """

    def __init__(self, context: SelectorContext, scorer: Scorer) -> None:
        self._scores = scorer
        self._scored_at: int | None = None
        self._importance: np.ndarray | None = None
        super().__init__(context)

    @property
    def table(self) -> ScoreTable | None:
        """Scores of the pool, as soon as there are any."""
        return self._scores.table

    def weights(self, rows: np.ndarray) -> np.ndarray | None:
        """See :meth:`_loss_weights`."""
        return None if self._importance is None else self._importance[rows]

    def quality(self) -> float | None:
        """Mean of sigmoid(Q) over S."""
        return None if self.table is None else self.table.mean_quality()

    def state_dict(self) -> dict[str, Any]:
        """The sampler's, the scorer's, and when the pool was scored last."""
        return {**super().state_dict(), "scored_at": self._scored_at, "scorer": self._scores.state_dict()}

    def _draw_by_scores(self, step: int) -> None:
        """Draw from S by p, as the scores in force say. A collective.

        Raises:
            UserError: the disk of TMPDIR has no room, on any rank.
        """
        self._scored_at = step
        with self.context.world.together():
            del self._sampler  # large pools have room on disk for one
            self._importance = None
            chosen, probabilities = self._scores.draws()
            if not self.config.stratifies:
                self._warn_of_lost_classes(chosen)
            self._sampler = self._make_sampler(chosen, self._drawn_by(probabilities), start=step)
            self._importance = self._loss_weights(chosen, probabilities)
