"""A split of a task, other than its pool, as what a scorer can look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from tsqlora_scale.tasks.batch import Batch
from tsqlora_scale.tasks.rows.sources import SplitName

if TYPE_CHECKING:
    from tsqlora_scale.tasks.task import Task


class SplitPool:
    """The rows of ``split``: a :class:`~tsqlora_scale.quality.pool.Pool`, from which nothing is drawn."""

    query = None
    query_rows = 0

    def __init__(self, task: Task, split: SplitName) -> None:
        self._task, self._split = task, split

    def __len__(self) -> int:
        return len(self._task.rows_of(self._split))

    @property
    def sample_ids(self) -> Sequence[str]:
        """Names of the samples, in order."""
        ids: Sequence[str] = self._task.rows_of(self._split)["sample_id"]
        return ids

    def digest(self) -> str:
        """A digest of the samples' content."""
        return self._task.digest(self._split)

    def lengths(self) -> np.ndarray:
        """Characters of input text, (N,) int32."""
        return self._task.lengths(self._split)

    def strata(self) -> np.ndarray | None:
        """The classes present, (N,) numbers from 0 without gaps; None without classes."""
        ids = self.class_ids()
        return None if ids is None else np.unique(ids, return_inverse=True)[1].astype(np.int32)

    def class_ids(self) -> np.ndarray | None:
        """The class of every sample, (N,) int32; None without classes."""
        return self._task.class_ids(self._split)

    def draw_weights(self) -> None:
        """None: nothing is drawn."""

    def texts(self, rows: np.ndarray) -> list[tuple[str, ...]]:
        """The texts of the samples at ``rows``."""
        return self._task.texts(rows, split=self._split)

    def batch(self, rows: np.ndarray, *, max_length: int | None = None) -> Batch:
        """The samples at ``rows``, on the CPU."""
        return self._task.batch(rows, split=self._split, max_length=max_length)

    def losses(self, module: Any, batch: Batch) -> Tensor:
        """Losses of the samples, (batch.size,), each its own mean, with a graph."""
        return self._task.losses(module, batch)
