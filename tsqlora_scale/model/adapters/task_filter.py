"""LoRATRF's task-aware filter (2412.09827, Eq. 4 and 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: The name that a filter has in its block.
SLOT = "task_filter"


class TaskFilter(nn.Module):
    """Adds to hidden states (..., d) what of them is relevant to the task, transformed.

    A token h is weighed by its cosine with the task vector t, clamped to [0, 1]: ``h~ = clamp(cos(h, t), 0, 1) h``;
    ``h + T h~`` goes on, with T of low rank. At the start the identity: one factor of T is zero.

    Args:
        size: d.
        rank: of T.
    """

    def __init__(self, size: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self._disable_adapters = False  # as PEFT's layers have it, for looks at the base alone
        self.task = nn.Parameter(torch.empty(size).normal_(generator=generator))
        self.down = nn.utils.skip_init(nn.Linear, size, rank, bias=False)
        self.up = nn.utils.skip_init(nn.Linear, rank, size, bias=False)
        with torch.no_grad():
            self.down.weight.uniform_(-1, 1, generator=generator).div_(size**0.5)
            self.up.weight.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        if self._disable_adapters:
            return hidden
        weight = nn.functional.cosine_similarity(hidden.float(), self.task.float(), dim=-1).clamp(0, 1)
        relevant = (weight.unsqueeze(-1) * hidden).to(self.down.weight.dtype)
        found: Tensor = hidden + self.up(self.down(relevant)).to(hidden.dtype)
        return found


def place_filters(base: nn.Module, blocks: list[str], size: int, rank: int, generator: torch.Generator) -> None:
    """Put a filter behind every block of a model, with values drawn in the blocks' order."""
    device = next(base.parameters()).device
    for name in blocks:
        block = base.get_submodule(name)
        block.add_module(SLOT, TaskFilter(size, rank, generator).to(device))
        block.register_forward_hook(_behind)


def _behind(block: Any, _: Any, output: Any) -> Any:
    """Blocks give hidden states, or several things of which these are the first."""
    if isinstance(output, tuple):
        return (block.task_filter(output[0]), *output[1:])
    return block.task_filter(output)
