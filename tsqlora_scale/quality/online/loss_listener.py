"""The last loss of every sample, as the training steps have it in passing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tsqlora_scale.common.disk_arrays import filled
from tsqlora_scale.quality.online.sample_listener import DeafListener
from tsqlora_scale.tasks.packing import Packing


class LossListener(DeafListener):
    """Keeps what the last visit of a sample has cost; of repeats within a step the last one.

    Attributes:
        losses: (N,) float64, the same on every rank; NaN of samples that were never visited with a finite loss.
    """

    def __init__(self, size: int) -> None:
        self.losses = filled(size, np.float64, np.nan)
        self._own: list[tuple[int, Tensor]] = []
        self._size = self._position = 0

    def start_step(self, step: int, size: int) -> None:
        """See :class:`.SampleListener`."""
        self._size, self._own = size, []

    def start_micro_batch(self, size: int, position: int, packing: Packing | None = None) -> None:
        """See :class:`.SampleListener`."""
        self._position = position

    def end_micro_batch(self, losses: Tensor, factors: Tensor) -> None:
        """See :class:`.SampleListener`."""
        self._own.append((self._position, losses.detach()))

    def numbers(self, like: Tensor) -> Tensor:
        """Losses of the step's samples, in its order, (size,)."""
        found = like.new_zeros(self._size)
        for position, losses in self._own:
            found[position : position + len(losses)] = losses.to(found)
        self._own = []
        return found

    def take(self, rows: np.ndarray, numbers: Tensor, *, taken: bool) -> None:
        """See :class:`.SampleListener`."""
        values = numbers.double().numpy()
        finite = np.isfinite(values)
        self.losses[rows[finite]] = values[finite]

    def state_dict(self) -> dict[str, Tensor]:
        """The losses."""
        return {"losses": torch.from_numpy(self.losses)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue with them."""
        self.losses[:] = state["losses"].numpy()
