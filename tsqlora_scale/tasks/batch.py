"""A batch: what the model receives, what it should have said, and which rows these are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: Target of a position that no loss is taken at.
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """B samples.

    Attributes:
        inputs: what ``model.forward`` receives, each of shape (B, T); never labels, for the loss is taken per sample.
        targets: class ids (B,) int64, numbers (B,) float32, or token ids (B, T) int64 with :data:`IGNORED` gaps.
        indices: the samples' rows in their split, (B,) int64.
        prompts: what texts are generated from, (B, P) each, where ``inputs`` do not tell; None otherwise.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    indices: np.ndarray
    prompts: dict[str, Tensor] | None = None

    @property
    def size(self) -> int:
        """Number of samples B."""
        return len(self.indices)

    def pinned(self) -> Batch:
        """The same batch in memory from which a GPU copies without the host waiting for it."""
        inputs = {name: tensor.pin_memory() for name, tensor in self.inputs.items()}
        return Batch(inputs, self.targets.pin_memory(), self.indices)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""

        def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        prompts = None if self.prompts is None else moved(self.prompts)
        return Batch(moved(self.inputs), self.targets.to(device, non_blocking=True), self.indices, prompts)


def pad_rows(rows: Sequence[Sequence[int]], value: int, *, on_the_left: bool = False) -> Tensor:
    """Rows of token ids, filled up on one side to the longest: (B, T) int64."""
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        start = out.shape[1] - len(row) if on_the_left else 0
        out[i, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
    return out
