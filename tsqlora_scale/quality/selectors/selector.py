"""The seam between the loop and what chooses its samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from tsqlora_scale.config.schema import Config
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.train_state import TrainState
from tsqlora_scale.quality.online.sample_listener import SampleListener
from tsqlora_scale.quality.pool import Pool
from tsqlora_scale.quality.scores.score_table import ScoreTable


@dataclass(frozen=True, kw_only=True)
class SelectorContext:
    """What a selector is built from.

    Attributes:
        config: of the run.
        pool: the samples.
        theta: the linear modules of a model whose parameters are scored, by name (an adapter type's ``theta``).
        world: the ranks.
        scoring_step: optimizer steps after which the pool is to be scored; None where the config asks for no scores.
        warmup_steps: optimizer steps whose samples are not to be scored by what the steps say.
        events: the schedule's steps, ascending; empty without a schedule.
        progress: told (samples done, samples of the pass) while the pool is scored.
        parts_folder: where the numbers of a pass are kept while it runs.
        without_batch: linear layers of the base that never get the batch as their first dimension.
        train_state: what the run trains and the optimizer's moments, whole, on every rank; a collective. None where
            nothing is trained.
    """

    config: Config
    pool: Pool[Any]
    theta: Callable[..., dict[str, nn.Linear]]
    world: World
    scoring_step: int | None = None
    warmup_steps: int = 0
    events: tuple[int, ...] = ()
    progress: Callable[[int, int], None] | None = None
    parts_folder: Path | None = None
    without_batch: frozenset[str] = frozenset()
    train_state: Callable[[], TrainState] | None = None


class Selector(Protocol):
    """Chooses the samples of every step (Algorithm 1, lines 2, 4 and 9). Built as ``Selector(context)``.

    All of it is the same on every rank: what is drawn is a function of the seed, the step and the scores alone.
    """

    @property
    def table(self) -> ScoreTable | None:
        """Scores of the pool; None as long as there are none."""
        ...

    def due(self, step: int) -> bool:
        """Whether :meth:`score` is wanted before the step that follows ``step`` finished ones."""
        ...

    def score(self, module: nn.Module, step: int) -> None:
        """Look at the pool with the unwrapped ``module``, and draw by what is seen from then on. A collective.

        Raises:
            UserError: on every rank.
        """
        ...

    def draw(self, step: int) -> np.ndarray:
        """The global batch of the step that follows ``step`` finished ones, (batch_size,) rows of the pool."""
        ...

    def weights(self, rows: np.ndarray) -> np.ndarray | None:
        """Weights of the losses of the drawn ``rows``, (batch_size,), up to a constant; None: all equal."""
        ...

    @property
    def listener(self) -> SampleListener:
        """Told of the samples of every step."""
        ...

    def quality(self) -> float | None:
        """Mean quality of S in (0, 1), which the rank budget follows; None where nothing is scored."""
        ...

    def finish(self) -> None:
        """The run is over: forget what only a pass needs."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that changes: JSON values and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`. A collective.

        Raises:
            UserError: it belongs to other data or other settings.
        """
        ...
