"""The seam between the samples and those who choose among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn


class BatchLike(Protocol):
    """What scoring needs to know of a batch."""

    @property
    def size(self) -> int:
        """Number of samples."""
        ...

    def to(self, device: torch.device | str) -> Any:
        """The same batch on ``device``."""
        ...


BatchT = TypeVar("BatchT", bound=BatchLike)
#: ``losses(module, batch) -> (batch.size,)``: every sample's own mean loss, with a graph.
LossFn = Callable[[nn.Module, BatchT], Tensor]


class Pool(Protocol[BatchT]):
    """The N samples that a run may learn from. :class:`~tsqlora_scale.tasks.Task` is one."""

    def __len__(self) -> int:
        """N."""
        ...

    @property
    def sample_ids(self) -> Sequence[str]:
        """Names of the samples, in order."""
        ...

    def digest(self) -> str:
        """A digest of the samples' content, in order."""
        ...

    def lengths(self) -> np.ndarray:
        """Lengths of the samples in any unit, (N,): enough to put samples of a length together."""
        ...

    def strata(self) -> np.ndarray | None:
        """Groups of the pool, (N,) numbers from 0 without gaps (the classes); None where there are none."""
        ...

    def class_ids(self) -> np.ndarray | None:
        """The class of every sample as the model numbers them, (N,) int32; None where there are none."""
        ...

    @property
    def query(self) -> Pool[BatchT] | None:
        """The samples of the wanted task (``task.query``); None without them."""
        ...

    @property
    def query_rows(self) -> int:
        """How many samples at the end of the pool are the query's own: known to be wanted."""
        ...

    def draw_weights(self) -> np.ndarray | None:
        """What multiplies how often each sample is drawn, (N,) float64, above 0; None: nothing does."""
        ...

    def texts(self, rows: np.ndarray) -> list[tuple[str, ...]]:
        """The texts of the samples at the pool's ``rows``, each of one or more: those of the answers last."""
        ...

    def batch(self, rows: np.ndarray, *, max_length: int | None = None) -> BatchT:
        """The samples at the pool's ``rows``, on the CPU, their texts cut to ``max_length`` tokens."""
        ...

    def losses(self, module: nn.Module, batch: BatchT) -> Tensor:
        """Losses of the samples, (batch.size,), each its own mean, with a graph."""
        ...
