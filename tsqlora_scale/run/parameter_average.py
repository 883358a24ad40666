"""The average of a run's last parameters: a model of its own at the end, and the teacher of the run while it trains.

Self-ensemble and self-distillation of Xu et al. 2020 (2002.10345), of adapters whose ranks may change in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from tsqlora_scale.common.random_streams import generator_for
from tsqlora_scale.config.schema import Config
from tsqlora_scale.engine.engine import Engine
from tsqlora_scale.ranks import current_ranks, layer_dims
from tsqlora_scale.ranks.factor_average import average_values
from tsqlora_scale.run.plan import due


class ParameterAverage:
    """The last T snapshots of what trains, whole, on every rank; none where ``train.average_last`` is not set.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self._seed = config.run.seed
        self._every = config.train.average_every if config.train.average_last else None
        self._snapshots: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=config.train.average_last or 0)
        self._average: tuple[Any, dict[str, Tensor]] | None = None

    @property
    def steps(self) -> list[int]:
        """After which steps the snapshots were taken, the oldest first."""
        return [step for step, _ in self._snapshots]

    def after_step(self, step: int, engine: Engine) -> None:
        """Take a snapshot where one is due after ``step`` finished steps. A collective."""
        if due(self._every, step):
            self.take(step, engine)

    def take(self, step: int, engine: Engine) -> None:
        """Take a snapshot. A collective."""
        values = {name: entry.value for name, entry in engine.gather().params.items()}
        self._snapshots.append((step, values))

    def values(self, module: nn.Module) -> Mapping[str, Tensor]:
        """The average by parameter name, with the ranks that ``module`` has now. There must be a snapshot.

        A function of snapshots and ranks alone: a resumed run gets the same. Computed when either has changed.
        """
        ranks = current_ranks(module)
        key = (self.steps, ranks)
        if self._average is None or self._average[0] != key:
            average = average_values(
                [values for _, values in self._snapshots],
                ranks=ranks,
                dims=layer_dims(module),
                generator=partial(generator_for, self._seed, "average", self.steps[-1]),
            )
            self._average = (key, average)
        return self._average[1]

    def state_dict(self) -> dict[str, Any]:
        """The snapshots, by step."""
        return {f"{step:08d}": values for step, values in self._snapshots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`."""
        self._snapshots.clear()
        self._snapshots.extend((int(step), state[step]) for step in sorted(state))
        self._average = None
