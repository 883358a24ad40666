"""``sampling.selector: less``: gradients that point where the query's point.

Xia et al., *LESS: Selecting Influential Data for Targeted Instruction Tuning*, 2402.04333: cosines of projected
gradients of the adapter after a warm-up. There the pool's gradients are what Adam makes of them
(``sampling.less_gradients: adam``), and the cosines of several checkpoints are added; here they are of one. There the
model is trained anew on what was chosen; here training goes on.

``sampling.less: subspace`` is after Min et al., *GIST: Targeted Data Selection for Instruction Tuning via Coupled
Optimization Geometry*, 2602.18584: both sides are projected on the leading directions of the query's gradients, which
for LoRA say more than moments of single parameters do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from tsqlora_scale.common.disk_arrays import filled, new_array
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.model.block_depths import lr_scales
from tsqlora_scale.quality.gradients.adam_update import AdamUpdate
from tsqlora_scale.quality.scores.scorer import QualityScorer
from tsqlora_scale.quality.selectors.gradient_passes import gradient_pass, sketches_of
from tsqlora_scale.quality.selectors.in_turn import rated_by_turns
from tsqlora_scale.quality.selectors.ranked import RankedSelector, Rating
from tsqlora_scale.quality.selectors.rds import unit

#: Leading directions of the query's gradients that ``subspace`` keeps.
DIRECTIONS = 16


class LessSelector(RankedSelector):
    """Cosines of gradient sketches to those of the query's rows: their mean, as published, their maximum, that of both
    within the query's own leading directions, or in turn.

    Samples that the pass has not looked at (``scoring.max_samples``) are rated by the mean of the others, samples whose
    gradient is not finite lowest.
    """

    def rate(self, module: nn.Module) -> Rating:
        """A pass of gradients over the query and one over the pool."""
        query, context = self.pool.query, self.context
        assert query is not None, "needs a query"
        # first: without moments there is nothing to do, and a pass is dear
        update = self._update(module) if self.config.sampling.less_gradients == "adam" else None
        of_query = gradient_pass(context, module, query, name="query", sketches=True)
        of_pool = gradient_pass(context, module, self.pool, name="pool", sketches=True, update=update)

        def found() -> np.ndarray:
            rows, wanted = (np.concatenate(parts) for parts in zip(*sketches_of(of_query), strict=True))
            return self._ratings(of_pool, unit(wanted[np.argsort(rows)]))  # a pass goes by length

        ratings = context.world.from_main(found)
        of_query.discard_parts()
        if not self.config.scoring.keep_sketches:
            of_pool.discard_parts()
        return Rating(ratings)

    def _update(self, module: nn.Module) -> AdamUpdate:
        """What the run's optimizer makes of a gradient now. A collective.

        Raises:
            UserError: it has not made a step.
        """
        assert self.context.train_state is not None, "needs an optimizer"
        state, train = self.context.train_state(), self.config.train
        if state.optimizer_steps == 0:
            raise UserError(
                "sampling.less_gradients='adam': the optimizer has made no step, so that it has no moments; raise "
                "scoring.warmup_steps, leave --adapter out, or set sampling.less_gradients=plain"
            )
        return AdamUpdate(state, betas=train.betas, eps=train.eps, scales=lr_scales(module, train.lr_decay))

    def _ratings(self, scorer: QualityScorer[Any], wanted: np.ndarray) -> np.ndarray:
        """Of every sample, (N,); on rank 0."""
        size, form = len(self.pool), self.config.sampling.less
        leading = leading_directions(wanted, DIRECTIONS) if form == "subspace" else None
        wanted = wanted if leading is None else unit(wanted @ leading.T)
        rows = np.concatenate([part.indices for part in scorer.parts])
        looked, usable = filled(size, bool, False), filled(size, bool, False)
        looked[rows] = True
        ratings = new_array(size, np.float64)
        likeness = new_array(size * len(wanted), np.float32).reshape(size, -1) if form == "round_robin" else None
        for places, sketches in sketches_of(scorer):
            inside = sketches if leading is None else sketches @ leading.T
            cosines = np.clip(unit(inside) @ wanted.T, -1, 1)
            usable[places] = True
            ratings[places] = cosines.mean(1) if form == "mean" else cosines.max(1)
            if likeness is not None:
                likeness[places] = cosines
        if likeness is not None:
            among = np.flatnonzero(usable[: self.choices])
            all_are = len(among) == self.choices  # whose likeness stays on the disk
            ratings[among] = rated_by_turns(
                likeness[: self.choices] if all_are else likeness[among], min(self.places, len(among))
            )
        others = usable & (ratings <= 1)  # the query's picks stand above all likeness
        ratings[~looked] = ratings[others].mean() if others.any() else ratings[usable].min() - 0.5
        ratings[looked & ~usable] = ratings[usable].min() - 1
        return ratings


def leading_directions(rows: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` leading right-singular directions of rows (m, k), orthonormal (min(count, m, k), k) float32."""
    _, _, directions = np.linalg.svd(rows.astype(np.float64), full_matrices=False)
    found: np.ndarray = directions[:count].astype(np.float32)
    return found
