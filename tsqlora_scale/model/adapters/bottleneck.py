"""Bottleneck adapters: small layers of two matrices behind the layers of a base (Houlsby et al. 2019; Pfeiffer et al.
2021)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tsqlora_scale.engine.sharded import whole_shape
from tsqlora_scale.model.adapters.own_type import OwnAdapter
from tsqlora_scale.model.adapters.placement import Placement
from tsqlora_scale.model.block_depths import block_of, chosen_blocks
from tsqlora_scale.model.blocks import hidden_size, outputs

#: The name that a bottleneck has in the linear layer that it follows.
SLOT = "bottleneck"


class Bottleneck(nn.Module):
    """``h + up(act(down(h)))`` of hidden states (..., d), through m numbers. At the start the identity: ``up`` is zero.

    Args:
        size: d.
        width: m.
    """

    def __init__(self, size: int, width: int, act: Callable[[Tensor], Tensor], generator: torch.Generator) -> None:
        super().__init__()
        self._disable_adapters = False  # as PEFT's layers have it, for looks at the base alone
        self.down = nn.utils.skip_init(nn.Linear, size, width)
        self.up = nn.utils.skip_init(nn.Linear, width, size)
        self.act = act
        with torch.no_grad():
            self.down.weight.uniform_(-1, 1, generator=generator).div_(size**0.5)
            for zero in (self.down.bias, self.up.weight, self.up.bias):
                zero.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        if self._disable_adapters:
            return hidden
        found: Tensor = hidden + self.up(self.act(self.down(hidden))).to(hidden.dtype)
        return found


def _through(layer: Any, _: Any, output: Tensor) -> Tensor:
    found: Tensor = layer.bottleneck(output)
    return found


class HoulsbyAdapter(OwnAdapter):
    """``adapter.type: houlsby``: behind attention and behind the feed-forward block, before what goes round them is
    added; GELU, as in the authors' code. Norms stay frozen.
    """

    name = "houlsby"
    after_attention = True
    act: Callable[[Tensor], Tensor] = staticmethod(nn.functional.gelu)

    def place(
        self, base: nn.Module, r: int, generator: torch.Generator, blocks: Collection[str | None] | None = None
    ) -> None:
        """See :class:`~.own_type.OwnAdapter`.

        Args:
            blocks: in these alone; None: in all.
        """
        size = hidden_size(base)
        device = next(base.parameters()).device
        for name in self._layers(base):
            if blocks is not None and block_of(name) not in blocks:
                continue
            layer = base.get_submodule(name)
            layer.add_module(SLOT, Bottleneck(size, r, self.act, generator).to(device))
            layer.register_forward_hook(_through)

    def put(self, base: nn.Module, placement: Placement) -> None:
        """See :class:`~.own_type.OwnAdapter`."""
        adapter = placement.adapter
        blocks = None if adapter.layers is None else chosen_blocks(base, adapter.layers)
        self.place(base, adapter.r, placement.generator, blocks)

    def put_saved(self, base: Any, description: Mapping[str, Any]) -> None:
        """In the blocks that the adapter has some in."""
        blocks = {block_of(name) for name in description["parameters"] if f".{SLOT}." in name}
        self.place(base, description["r"], torch.Generator(), blocks)

    def _layers(self, base: nn.Module) -> list[str]:
        attention, feed_forward = outputs(base)
        return sorted([*(attention if self.after_attention else []), *feed_forward])

    def chosen(self, model: nn.Module, unreached: Collection[str]) -> set[str]:
        """All of the bottlenecks behind layers that the logits depend on."""
        parts = (name.partition(f".{SLOT}.") for name, _ in model.named_parameters())
        return {"".join(part) for part in parts if part[1] and part[0] not in unreached}

    def check(self, model: nn.Module) -> None:
        """See :func:`.blocks.outputs`."""
        self._layers(model)

    def width(self, base: nn.Module) -> int:
        """Of the bottlenecks."""
        found = next(part for part in base.modules() if isinstance(part, Bottleneck))
        return int(whole_shape(found.down.weight)[0])

    def theta(self, module: nn.Module, *, include_head: bool = False) -> dict[str, nn.Linear]:
        """Both layers of every bottleneck; with ``include_head`` those that train whole, too."""
        heads = {name.rpartition(".")[0] for name in self.heads(module)} if include_head else set()
        linear = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
        return {name: part for name, part in sorted(linear.items()) if f".{SLOT}." in name or name in heads}


class PfeifferAdapter(HoulsbyAdapter):
    """``adapter.type: pfeiffer``: behind the feed-forward block alone; ReLU."""

    name = "pfeiffer"
    after_attention = False
    act: Callable[[Tensor], Tensor] = staticmethod(nn.functional.relu)
