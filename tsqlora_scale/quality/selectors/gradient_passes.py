"""Passes of per-sample gradients for selectors that rate once: norms, and sketches of pool and query."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from tsqlora_scale.quality.gradients.folds import Update
from tsqlora_scale.quality.pool import Pool
from tsqlora_scale.quality.scores.scorer import QualityScorer
from tsqlora_scale.quality.selectors.selector import SelectorContext


def gradient_pass(
    context: SelectorContext,
    module: nn.Module,
    pool: Pool[Any],
    *,
    name: str,
    sketches: bool,
    update: Update | None = None,
) -> QualityScorer[Any]:
    """A scorer after its one pass over ``pool``, by first-order numbers alone. A collective.

    Args:
        name: of the pass among those that one selector makes.
        sketches: keep sketches of the gradients; on rank 0, in the scorer's ``parts``.
        update: what the sketches are of; None: the gradients.

    Raises:
        UserError: no sample has a finite loss and gradient.
    """
    config = context.config
    whole = {} if pool is context.pool else {"max_samples": None}
    whole["weights"] = None  # which could make it a pass of losses alone
    scoring = config.scoring.model_copy(
        update={"delta_loss": "first_order", "convergence": "alignment" if sketches else "loss_trend", **whole}
    )
    scorer = QualityScorer(
        scoring,
        config.sampling.model_copy(update={"redundancy": 0.0}),
        pool=pool,
        theta=partial(context.theta, include_head=scoring.include_head),
        world=context.world,
        seed=config.run.seed,
        eta=scoring.eta or config.train.lr,
        model_name=config.model.weights_name,
        progress=context.progress,
        parts_folder=None if context.parts_folder is None else context.parts_folder / name,
        update=update,
    )
    scorer.score(module)
    return scorer


def sketches_of(scorer: QualityScorer[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows (n,) of the pool and their sketches (n, k) float32, part by part; finite ones alone. On rank 0."""
    for part in scorer.parts:
        usable = np.isfinite(part.sketches).all(1)
        yield part.indices[usable], part.sketches[usable]
