"""``sampling.selector: quality`` with ``scoring.source: online``: the training steps themselves say what is good."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from torch import nn

from tsqlora_scale.quality.draws.batch_sampler import BatchSampler
from tsqlora_scale.quality.draws.subset import share_of
from tsqlora_scale.quality.online.online_scorer import OnlineScorer
from tsqlora_scale.quality.online.sample_listener import SampleListener
from tsqlora_scale.quality.selectors.by_quality import refresh_steps
from tsqlora_scale.quality.selectors.by_scores import ScoredSelector
from tsqlora_scale.quality.selectors.selector import SelectorContext


class OnlineSelector(ScoredSelector):
    """Draws evenly for an epoch or more, then from S by p, of the averages of what the steps have heard.

    p is taken anew after every |S| samples drawn, and at the events that ``scoring.refresh`` names; with
    ``refresh: none`` never. S stays as it was chosen first. A run that ends before that draws evenly throughout.

    Attributes:
        scorer: what is known of the samples.
    """

    def __init__(self, context: SelectorContext) -> None:
        config = context.config
        self.scorer = OnlineScorer(
            config.scoring,
            config.sampling,
            pool=context.pool,
            theta=partial(context.theta, include_head=config.scoring.include_head),
            world=context.world,
            seed=config.run.seed,
            eta=config.scoring.eta or config.train.lr,
            stratify=config.stratifies,
            warmup_steps=context.warmup_steps,
            without_batch=context.without_batch,
        )
        self._refreshes = refresh_steps(config.scoring, context.events)
        always = context.pool.query_rows
        members = share_of(config.sampling.most_kept, len(context.pool) - always) + always
        self._epoch = -(-members // config.train.batch_size)
        super().__init__(context, self.scorer)

    @property
    def listener(self) -> SampleListener:
        """The scorer."""
        return self.scorer

    def due(self, step: int) -> bool:
        """After the epochs of even draws, and then after every epoch of S and at the events that refresh scores."""
        if self._scored_at is None:
            return self.context.scoring_step is not None and step >= self.context.scoring_step
        if self.config.scoring.refresh == "none" or step <= self._scored_at:
            return False
        return step - self._scored_at >= self._epoch or step in self._refreshes

    def score(self, module: nn.Module, step: int) -> None:
        """Take p, and S the first time, by what the steps have said; no pass over anything."""
        self.scorer.score()
        self._draw_by_scores(step)

    def finish(self) -> None:
        """Leave a table, also of a run that has never drawn by it."""
        self.scorer.finish()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~tsqlora_scale.quality.selectors.selector.Selector`."""
        with self.context.world.together():
            self.scorer.load_state_dict(state["scorer"])
        if self.scorer.table is not None:
            self._draw_by_scores(state["sampler"]["start"])
            self._scored_at = state["scored_at"]
        super().load_state_dict(state)

    def _make_sampler(self, rows: np.ndarray, probabilities: np.ndarray | None, *, start: int) -> BatchSampler:
        """Without replacement before there are scores, whatever the pool's weights: each sample is to be seen."""
        sampler = super()._make_sampler(rows, probabilities, start=start)
        if probabilities is None and self._scored_at is None and sampler.replacement:
            return BatchSampler(
                sampler.indices,
                sampler.weights,
                batch_size=sampler.batch_size,
                seed=sampler.seed,
                replacement=False,
                start=start,
            )
        return sampler
