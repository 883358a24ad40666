"""``sampling.selector: quality``: score the pool, keep S, draw by p (Eq. 1 and 2; Algorithm 1, lines 2, 4 and 9)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from tsqlora_scale.config.schema import ScoringConfig
from tsqlora_scale.quality.scores.score_table import ScoreTable
from tsqlora_scale.quality.scores.scorer import QualityScorer
from tsqlora_scale.quality.selectors.by_scores import ScoredSelector
from tsqlora_scale.quality.selectors.selector import SelectorContext


class QualitySelector(ScoredSelector):
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
            model_name=config.model.weights_name,
            progress=context.progress,
            parts_folder=context.parts_folder,
        )
        self._refreshes = refresh_steps(config.scoring, context.events)
        super().__init__(context, self.scorer)

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

    def finish(self) -> None:
        """Remove the parts of the last pass, unless they are to be kept."""
        if self.context.world.is_main and not self.config.scoring.keep_sketches:
            self.scorer.discard_parts()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~tsqlora_scale.quality.selectors.selector.Selector`."""
        if state["scorer"]["table"] is not None:
            with self.context.world.together():
                self.scorer.load_state_dict(state["scorer"])
            self._draw_by_scores(state["sampler"]["start"])
            self._scored_at = state["scored_at"]
        super().load_state_dict(state)


def refresh_steps(scoring: ScoringConfig, events: tuple[int, ...]) -> frozenset[int]:
    """Steps after which scores are taken anew: no event of the schedule, every one, or every N-th."""
    if scoring.refresh == "none":
        return frozenset()
    every = 1 if scoring.refresh == "every_event" else scoring.refresh
    return frozenset(events[every - 1 :: every])
