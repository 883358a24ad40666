"""Samples of a batch laid end to end in few rows, in the place of a row each that is padded to the longest.

Positions begin anew with every sample, and no token sees one of another sample: Transformers' masks (of eager
attention, ``scaled_dot_product_attention`` and flex attention, windows among them) are told which sample a position is
of, and flash attention takes the samples apart by their positions. So a sample's logits, its loss and its gradient are
what they are alone. A batch keeps its padded form, too: targets are counted in it, and whoever looks at single samples
is given their rows back.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tsqlora_scale.common.errors import UserError

#: Of what a row each costs, the most that fewer rows may: a mask that attention has to read costs something, too.
GAIN = 0.9
#: What the model receives of a batch that can be packed.
PACKED = {"input_ids", "attention_mask"}


@dataclass(frozen=True)
class Packing:
    """Where the tokens of B samples, padded (B, T), stand in the R rows of W positions that they are laid in.

    Attributes:
        inputs: what the model receives, (R, W) each; for flash attention also where samples begin, and the most tokens
            of one.
        samples: which sample a position is of, (R, W) int64; B where a row has none left.
        places: where logits are looked at, positions (n,) in the flattened (R, W), in the order of the batch's own.
        tokens: positions of all tokens in the flattened (R, W), sample after sample, (sum of lengths,) int64.
        cells: of the same tokens in the flattened (B, T).
        starts: where each sample begins in those two, and where the last one ends: B + 1 numbers, on the host.
        padded: (B, T).
    """

    inputs: dict[str, Any]
    samples: Tensor
    places: Tensor
    tokens: Tensor
    cells: Tensor
    starts: tuple[int, ...]
    padded: tuple[int, int]

    @property
    def shape(self) -> torch.Size:
        """(R, W)."""
        return self.samples.shape

    def each(self, change: Any) -> Packing:
        """The same with every tensor changed."""
        return replace(
            self,
            inputs={name: change(one) if isinstance(one, Tensor) else one for name, one in self.inputs.items()},
            samples=change(self.samples),
            places=change(self.places),
            tokens=change(self.tokens),
            cells=change(self.cells),
        )

    def for_flash(self) -> Packing:
        """One row, with what spares flash attention from finding out in every layer where samples begin."""
        begins = torch.tensor(self.starts, dtype=torch.int32)
        longest = max(end - start for start, end in pairwise(self.starts))
        more = {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": longest, "max_length_k": longest}
        return replace(self, inputs=self.inputs | more)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor (R, W, ...) is one of the rows' positions."""
        return tensor.dim() > 2 and tensor.shape[:2] == self.shape

    def rows(self, tensor: Tensor) -> Tensor:
        """(R, W, d) to (B, T, d), a sample a row; zero where there is no token. Without a graph."""
        padded, (rows, width) = tensor.flatten(0, 1), self.padded
        out = tensor.new_zeros(rows * width, tensor.shape[-1])
        return out.index_copy_(0, self.cells, padded.index_select(0, self.tokens)).view(rows, width, -1)

    def laid(self, tensor: Tensor) -> Tensor:
        """(B, T, d) to (R, W, d); zero where a row has no sample. Without a graph."""
        out = tensor.new_zeros(self.shape.numel(), tensor.shape[-1])
        out.index_copy_(0, self.tokens, tensor.flatten(0, 1).index_select(0, self.cells))
        return out.view(*self.shape, -1)

    def tokens_of(self, tensor: Tensor, group: slice) -> Tensor:
        """(R, W, d) to the tokens of the samples ``group.start`` to ``group.stop``, (n, d), sample after sample."""
        chosen = self.tokens[self.starts[group.start] : self.starts[group.stop]]
        return tensor.flatten(0, 1).index_select(0, chosen)


class Packer:
    """Decides on rows, and lays samples in them.

    Args:
        width: of the model's hidden states: by it the cost of attention is weighed against that of all else.
        longest_row: most tokens of a row, but for a longer sample.
        flash: all samples in one row, as flash attention takes them: it leaves out what no token sees.
        takes_starts: whether the model hands on what it does not know to flash attention.
    """

    def __init__(self, *, width: int, longest_row: int, flash: bool = False, takes_starts: bool = False) -> None:
        self._width, self._longest_row = width, longest_row
        self._flash, self._takes_starts = flash, flash and takes_starts

    def packed(self, inputs: dict[str, Tensor], places: Tensor | None) -> Packing | None:
        """A batch's samples end to end; None where they are best left a row each.

        Args:
            inputs: ids and mask (B, T), padded on the right, on the host.
            places: of the batch.

        Raises:
            UserError: the model receives more than ids and mask.
        """
        if set(inputs) != PACKED or places is None:
            reason = "takes losses of its own" if places is None else f"gives the model {', '.join(sorted(inputs))}"
            raise UserError(
                "train.packing: token ids and their mask are all that is laid end to end, for losses of tokens, and "
                f"task.objective {reason}; set it to false"
            )
        lengths = inputs["attention_mask"].sum(1).tolist()
        if self._flash:
            rows = [list(range(len(lengths)))]
        else:
            rows = rows_of(lengths, longest_row=self._longest_row, width=self._width)
        return None if len(rows) == len(lengths) else self.laid(inputs, places, rows)

    def laid(self, inputs: dict[str, Tensor], places: Tensor, rows: Sequence[Sequence[int]]) -> Packing:
        """:func:`lay`, as the model takes it."""
        packing = lay(inputs, places, rows)
        return packing.for_flash() if self._takes_starts else packing


def rows_of(lengths: Sequence[int], *, longest_row: int, width: int) -> list[list[int]]:
    """Which samples share a row: for every number of rows, the longest samples first, each to the row that is shortest
    so far; then the number that costs least.

    A position costs its products with the weights, about 12 width^2 a layer, and those of attention with all positions
    of its row, 2 width W. Where less than a tenth is saved (:data:`GAIN`), every sample has a row of its own.

    Args:
        lengths: of the samples in tokens, (B,).
        longest_row: most tokens of a row, but for a longer sample.

    Returns:
        The samples of every row, in their order.
    """
    total, longest = sum(lengths), max(lengths)
    by_length = sorted(range(len(lengths)), key=lambda sample: (-lengths[sample], sample))
    best: list[list[int]] = [[sample] for sample in range(len(lengths))]
    least = GAIN * _cost(len(lengths), longest, width)
    for count in range(1, len(lengths)):
        shortest = max(longest, -(-total // count))  # that the rows can be
        if shortest > max(longest_row, longest) or _cost(count, shortest, width) >= least:
            continue
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [(0, row) for row in range(count)]
        for sample in by_length:
            tokens, row = filled[0]
            rows[row].append(sample)
            heapq.heapreplace(filled, (tokens + lengths[sample], row))
        found = max(tokens for tokens, _ in filled)
        if found <= max(longest_row, longest) and _cost(count, found, width) < least:
            best, least = [sorted(row) for row in rows], _cost(count, found, width)
    return best


def _cost(rows: int, length: int, width: int) -> float:
    return rows * length * (6 * width + length)


def lay(inputs: dict[str, Tensor], places: Tensor, rows: Sequence[Sequence[int]]) -> Packing:
    """Lay a batch's samples, padded on the right (B, T), end to end in ``rows``, each sample in one of them."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    size, width = ids.shape
    within = torch.arange(width)
    lengths = mask.sum(1)
    assert torch.equal(mask, within < lengths[:, None]), "rows are padded on the right"
    long = max(sum(int(lengths[sample]) for sample in row) for row in rows)
    begin = torch.zeros(size, dtype=torch.int64)  # of each sample in the flattened rows
    ends = []
    for number, row in enumerate(rows):
        at = number * long
        for sample in row:
            begin[sample] = at
            at += int(lengths[sample])
        ends.append(at - number * long)
    moved = (begin[:, None] + within).flatten()  # of every place of the padded form
    cells = mask.flatten().nonzero().squeeze(1)
    tokens = moved[cells]
    # what is left of a row is a text of its own, from its position 0 on
    positions = (torch.arange(long) - torch.tensor(ends)[:, None]).clamp(min=0).flatten()
    positions[tokens] = within.repeat(size)[cells]
    samples = torch.full((len(rows) * long,), size)
    samples[tokens] = torch.arange(size).repeat_interleave(width)[cells]
    laid = torch.zeros(len(rows) * long, dtype=ids.dtype)
    laid[tokens] = ids.flatten()[cells]
    return Packing(
        inputs={"input_ids": laid.view(-1, long), "position_ids": positions.view(-1, long)},
        samples=samples.view(-1, long),
        places=moved[places],
        tokens=tokens,
        cells=cells,
        starts=(0, *lengths.cumsum(0).tolist()),
        padded=(size, width),
    )


@contextmanager
def known_samples(packing: Packing) -> Iterator[None]:
    """Inside, masks for positions of this shape are told which sample each is of. Transformers would find it out by the
    positions, and look whether there is more than one in a row: a read of the device. So is its look for padding where
    there is no mask of it, which here there need not be."""
    from transformers import PreTrainedModel, masking_utils

    find, warn = masking_utils.find_packed_sequence_indices, PreTrainedModel.warn_if_padding_and_no_attention_mask

    def known(position_ids: Tensor) -> Tensor | None:
        return packing.samples if position_ids.shape == packing.shape else find(position_ids)

    def silent(*_: Any, **__: Any) -> None: ...

    setattr(masking_utils, "find_packed_sequence_indices", known)  # noqa: B010
    setattr(PreTrainedModel, "warn_if_padding_and_no_attention_mask", silent)  # noqa: B010
    try:
        yield
    finally:
        setattr(masking_utils, "find_packed_sequence_indices", find)  # noqa: B010
        setattr(PreTrainedModel, "warn_if_padding_and_no_attention_mask", warn)  # noqa: B010
