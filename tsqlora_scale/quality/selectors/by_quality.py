"""``sampling.selector: quality``: score the pool, keep S, draw by p (Eq. 1 and 2; Algorithm 1, lines 2, 4 and 9)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from torch import nn

from tsqlora_scale.common.disk_arrays import filled
from tsqlora_scale.config.schema import ScoringConfig
from tsqlora_scale.quality.draws.subset import importance_weights, loss_weights
from tsqlora_scale.quality.scores.score_table import ScoreTable
from tsqlora_scale.quality.scores.scorer import QualityScorer
from tsqlora_scale.quality.selectors.full import FullSelector
from tsqlora_scale.quality.selectors.selector import SelectorContext


class QualitySelector(FullSelector):
    """Draws evenly until the pool is scored, then from S by p; scores a share of S anew at events of the schedule.

    Attributes:
        scorer: the passes and what is kept between them.
    """

    def __init__(self, context: SelectorContext) -> None:
        config = context.config
        self.scorer: QualityScorer[Any] = QualityScorer(
            config.scoring,
            config.sampling,
            pool=context.pool,
            theta=partial(context.theta, include_head=config.scoring.include_head),
            world=context.world,
            seed=config.run.seed,
            eta=config.scoring.eta or config.train.lr,
            stratify=config.stratifies,
            model_name=f"{config.model.name_or_path} {config.model.dtype} {config.model.quantization}",
            progress=context.progress,
            parts_folder=context.parts_folder,
        )
        self._refreshes = refresh_steps(config.scoring, context.events)
        self._scored_at: int | None = None
        self._importance: np.ndarray | None = None
        super().__init__(context)

    @property
    def table(self) -> ScoreTable | None:
        """Scores of the pool, from the first pass on."""
        return self.scorer.table

    def due(self, step: int) -> bool:
        """At the first pass's step, and at the events that refresh scores."""
        if self._scored_at is None:
            # later where a resumed run was made so short that its step is past
            return self.context.scoring_step is not None and step >= self.context.scoring_step
        return step > self._scored_at and step in self._refreshes

    def score(self, module: nn.Module, step: int) -> None:
        """Score the pool or, once that is done, a share of S."""
        self.scorer.score(module, refresh=self._scored_at is not None)
        self._draw_by_scores(step)

    def adopt(self, table: ScoreTable, step: int) -> None:
        """Draw by the scores of another model's pass from ``step`` on. A collective."""
        self.scorer.adopt(table)
        self._draw_by_scores(step)

    def weights(self, rows: np.ndarray) -> np.ndarray | None:
        """``1 / (|S| p)`` under ``sampling.unbiased``, ``|S| p`` under ``sampling.use: weight``."""
        return None if self._importance is None else self._importance[rows]

    def quality(self) -> float | None:
        """Mean of sigmoid(Q) over S."""
        return None if self.table is None else self.table.mean_quality()

    def finish(self) -> None:
        """Remove the parts of the last pass, unless they are to be kept."""
        if self.context.world.is_main and not self.config.scoring.keep_sketches:
            self.scorer.discard_parts()

    def state_dict(self) -> dict[str, Any]:
        """The sampler's, the scorer's, and when the pool was scored last."""
        return {**super().state_dict(), "scored_at": self._scored_at, "scorer": self.scorer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~tsqlora_scale.quality.selectors.selector.Selector`."""
        if state["scorer"]["table"] is not None:
            with self.context.world.together():
                self.scorer.load_state_dict(state["scorer"])
            self._draw_by_scores(state["sampler"]["start"])
            self._scored_at = state["scored_at"]
        super().load_state_dict(state)

    def _draw_by_scores(self, step: int) -> None:
        """Draw from S by p, as the scores in force say. A collective.

        Raises:
            UserError: the disk of TMPDIR has no room, on any rank.
        """
        self._scored_at = step
        with self.context.world.together():
            del self._sampler  # large pools have room on disk for one
            self._importance = None
            chosen, probabilities = self.scorer.draws()
            sampling = self.config.sampling
            weighs = sampling.use == "weight"
            self._sampler = self._make_sampler(chosen, None if weighs else probabilities, start=step)
            if weighs or sampling.unbiased:
                of_loss = loss_weights if weighs else importance_weights
                self._importance = filled(len(self.pool), np.float64, 1.0)
                self._importance[chosen] = of_loss(probabilities, sampling.max_weight)


def refresh_steps(scoring: ScoringConfig, events: tuple[int, ...]) -> frozenset[int]:
    """Steps after which scores are taken anew: no event of the schedule, every one, or every N-th."""
    if scoring.refresh == "none":
        return frozenset()
    every = 1 if scoring.refresh == "every_event" else scoring.refresh
    return frozenset(events[every - 1 :: every])
