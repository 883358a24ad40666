"""What the training steps have said of every sample so far: averages over its visits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsqlora_scale.common.disk_arrays import copied, filled
from tsqlora_scale.quality.scores.pass_scores import TERMS
from tsqlora_scale.quality.scores.score_table import ScoreTable

#: the columns that are averages
MEASURED = ("loss", *TERMS)
#: visits of a sample that was visited, and never with finite numbers
NEVER_FINITE = -1


class RunningScores:
    """Averages over visits, in the columns of a table, and the direction in which the samples want to go.

    Visits whose numbers are not finite do not count, and a sample that has had no others has no finite number.

    Args:
        table: whose columns :data:`MEASURED` are written into as samples are visited; the others are left alone.
        memory: of the direction: what a step adds to it weighs so much less with every later step.

    Attributes:
        visits: of every sample, (N,) int32; :data:`NEVER_FINITE` where none of them had finite numbers.
        direction: sum of sketches, (sketch_dim,) float64; zero before the first step.
    """

    def __init__(self, table: ScoreTable, *, sketch_dim: int, memory: float) -> None:
        self.table = table
        self.memory = memory
        self.visits = filled(len(table), np.int32, 0)
        self.direction = torch.zeros(sketch_dim, dtype=torch.float64)

    def visit(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Take numbers of visits into the averages.

        Args:
            rows: of the pool, (n,), repeats allowed.
            values: loss, gradient norm, loss reduction and convergence of each, (n, 4).
        """
        finite = np.isfinite(values).all(axis=1)
        bad = rows[~finite]
        bad = bad[self.visits[bad] <= 0]
        self.visits[bad] = NEVER_FINITE
        for name in MEASURED:
            getattr(self.table, name)[bad] = np.nan
        seen, places = np.unique(rows[finite], return_inverse=True)
        before = np.maximum(self.visits[seen], 0)
        after = before + np.bincount(places, minlength=len(seen))
        for name, column in zip(MEASURED, values[finite].T, strict=True):
            means = getattr(self.table, name)
            total = np.bincount(places, column, minlength=len(seen))
            # a first visit's number itself, whatever the column held before
            means[seen] = np.where(before > 0, means[seen], 0.0) * (before / after) + total / after
        self.visits[seen] = after

    def turn(self, sketches: Tensor) -> None:
        """Take a step's sum of sketches, (sketch_dim,) float64, into the direction."""
        self.direction = self.memory * self.direction + sketches

    def state_dict(self) -> dict[str, Any]:
        """Visits and direction; the averages are the table's."""
        return {"visits": torch.from_numpy(self.visits), "direction": self.direction.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the table of then in place."""
        self.visits = copied(state["visits"].numpy())
        self.direction = state["direction"].clone()
