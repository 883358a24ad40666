"""A batch: what the model receives, what it should have said, and which rows these are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tsqlora_scale.tasks.known_padding import Padding
from tsqlora_scale.tasks.packing import Packing

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
        places: where logits are looked at, positions (n,) int64 in the flattened (B, T) of the targets; None where it
            is not known beforehand, or where there are no tokens. Found out on the host, so that a GPU need not be
            waited for.
        padding: what the host knows of the padding of the inputs; None: nothing.
        packing: the samples laid end to end in fewer rows, as the model receives them then; None: a row each.
        words: of a prompt, the tokens (C,) int64 whose logits at the samples' ``places`` are those of the classes;
            None: logits are of classes, numbers or texts as they come.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    indices: np.ndarray
    prompts: dict[str, Tensor] | None = None
    places: Tensor | None = None
    padding: Padding | None = None
    packing: Packing | None = None
    words: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of what ``places`` count in: (B, T) of the tokens that logits are of."""
        if self.targets.dim() == 2:
            return self.targets.shape
        return self.inputs["decoder_input_ids" if "decoder_input_ids" in self.inputs else "input_ids"].shape

    @property
    def size(self) -> int:
        """Number of samples B."""
        return len(self.indices)

    def pinned(self) -> Batch:
        """The same batch in memory from which a GPU copies without the host waiting for it."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: change(tensor) for name, tensor in tensors.items()}

        prompts = None if self.prompts is None else changed(self.prompts)
        places = None if self.places is None else change(self.places)
        return replace(
            self,
            inputs=changed(self.inputs),
            targets=change(self.targets),
            prompts=prompts,
            places=places,
            packing=None if self.packing is None else self.packing.each(change),
            words=None if self.words is None else change(self.words),
        )


def pad_rows(rows: Sequence[Sequence[int]], value: int, *, on_the_left: bool = False) -> Tensor:
    """Rows of token ids, filled up on one side to the longest: (B, T) int64."""
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        start = out.shape[1] - len(row) if on_the_left else 0
        out[i, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
    return out


def class_logits(logits: Tensor, batch: Batch) -> Tensor:
    """Logits (B, C) of the classes, of a forward's on the batch: as they are, or those of a prompt's words at its slot.

    Args:
        logits: (B, C) of a head; of tokens (B, T, V), or those of the batch's places alone, (1, B, V).
    """
    return logits if batch.words is None else slot_logits(logits, batch).index_select(1, batch.words)


def slot_logits(logits: Tensor, batch: Batch) -> Tensor:
    """Logits (B, V) of all tokens at the slots of a batch of prompts.

    Args:
        logits: (B, T, V), or those of the batch's places alone, (1, B, V).
    """
    assert batch.places is not None, "prompts have slots"
    if logits.shape[:2] == batch.shape:
        return logits.flatten(0, 1).index_select(0, batch.places)
    return logits[0]


def places_of(targets: Tensor, shift: int) -> Tensor:
    """Where a loss is taken at, of targets (B, T) on the host: positions (n,) in the flattened (B, T), each ``shift``
    before its target; a row's first ``shift`` positions have none before them."""
    rows, columns = torch.nonzero(targets[:, shift:] != IGNORED, as_tuple=True)
    return rows * targets.shape[1] + columns
