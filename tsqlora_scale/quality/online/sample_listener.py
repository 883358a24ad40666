"""The seam between a training step and whoever wants to know something of its samples."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor, nn

from tsqlora_scale.tasks.packing import Packing


class SampleListener(Protocol):
    """Told of a step's samples and passes: the data half of a run, where the steps give its scores.

    All ranks' numbers of a step meet in the sum over ranks that a step ends with anyway.
    """

    def attach(self, module: nn.Module) -> None:
        """Listen to ``module``; before every ``prepare`` of an engine."""
        ...

    def start_step(self, step: int, size: int) -> None:
        """The step that follows ``step`` finished ones begins, over a global batch of ``size`` samples."""
        ...

    def start_micro_batch(self, size: int, position: int, packing: Packing | None = None) -> None:
        """A forward and backward pass over ``size`` samples, of the global batch from ``position`` on, begins; with
        ``packing`` they stand end to end in it."""
        ...

    def end_micro_batch(self, losses: Tensor, factors: Tensor) -> None:
        """That backward pass is over.

        Args:
            losses: of the samples, each its own mean, (size,).
            factors: what makes the gradient of a sample's own mean loss of its part in the pass's gradient, (size,).
        """
        ...

    def numbers(self, like: Tensor) -> Tensor:
        """What this rank has heard in the step, (n,) of the type and on the device of ``like``, zeros where others
        have; n is the same on every rank. The host does not wait for the device, here nor in a pass."""
        ...

    def take(self, rows: np.ndarray, numbers: Tensor, *, taken: bool) -> None:
        """The step is over.

        Args:
            rows: its samples, (size,) rows of the pool.
            numbers: the sum of all ranks' :meth:`numbers`, on the host.
            taken: whether the optimizer has stepped.

        Raises:
            UserError: on every rank.
        """
        ...


class DeafListener:
    """Where nothing is to be known of samples."""

    def attach(self, module: nn.Module) -> None:
        """Nothing to do."""

    def start_step(self, step: int, size: int) -> None:
        """Nothing to do."""

    def start_micro_batch(self, size: int, position: int, packing: Packing | None = None) -> None:
        """Nothing to do."""

    def end_micro_batch(self, losses: Tensor, factors: Tensor) -> None:
        """Nothing to do."""

    def numbers(self, like: Tensor) -> Tensor:
        """None."""
        return like.new_zeros(0)

    def take(self, rows: np.ndarray, numbers: Tensor, *, taken: bool) -> None:
        """Nothing to do."""
