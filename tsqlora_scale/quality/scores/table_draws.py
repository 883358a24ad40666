"""From qualities to draws: p of the whole pool and, the first time, S (Eq. 2; Algorithm 1, line 4)."""

from __future__ import annotations

import numpy as np

from tsqlora_scale.config.schema import SamplingConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality.draws.subset import select_subset
from tsqlora_scale.quality.scores.equations import log_probabilities
from tsqlora_scale.quality.scores.score_table import ScoreTable


def set_draws(
    table: ScoreTable,
    quality: np.ndarray,
    sampling: SamplingConfig,
    *,
    world: World,
    seed: int,
    strata: np.ndarray | None,
    always: int | None,
) -> None:
    """Set the table's probabilities and, if ``always`` is a number, S, in place. A collective.

    Args:
        quality: by which, (N,).
        strata: groups of the pool, (N,), each of which keeps its share; None is one group.
        always: samples at the pool's end that belong to S whatever they are; None: S stays as it is.

    Raises:
        UserError: the disk of TMPDIR has no room, on any rank.
    """
    log_p = log_probabilities(quality, sampling.tau, world, strata)
    np.exp(log_p, out=table.probability)
    if always is not None:
        with world.together():
            table.selected = select_subset(len(table), log_p, sampling, seed=seed, strata=strata, always=always)
