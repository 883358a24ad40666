"""What a rank holds between steps, counted parameter by parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from torch import nn

from tsqlora_scale.config.schema import Config
from tsqlora_scale.model.base_model import DTYPES
from tsqlora_scale.planning.phantom import BLOCK, Phantom

#: Elements up to which ZeRO-3 leaves a parameter whole on every rank, DeepSpeed's default.
PERSISTENT = 100_000
#: Float32 numbers of the code of a 4-bit weight.
CODE = 16


@dataclass(frozen=True)
class FrozenWeight:
    """A frozen parameter as it lies in memory.

    Attributes:
        elements: of its storage: two weights of a 4-bit one in a byte.
        bytes_each: of an element.
        scales: bytes of the scales of its blocks, which lie beside it and are never sharded.
        unpacked: bytes of the same in the type that is computed in, where that is another one.
    """

    elements: int
    bytes_each: int
    scales: int = 0
    unpacked: int = 0

    def held(self, ranks: int) -> int:
        """Bytes on one of ``ranks`` ranks that share it, as ZeRO-3 does."""
        shared = self.elements > PERSISTENT
        return (ceil(self.elements / ranks) if shared else self.elements) * self.bytes_each


@dataclass(frozen=True)
class HeldWeights:
    """The parameters of a run.

    Attributes:
        frozen: the base.
        trained: elements of each parameter that trains: factors and head.
        head: elements of those that are no factors.
        largest_layer: elements of the largest adapted layer's weight.
    """

    frozen: Sequence[FrozenWeight]
    trained: Sequence[int]
    head: int
    largest_layer: int

    @property
    def base(self) -> int:
        """Bytes of the base, whole."""
        return sum(weight.elements * weight.bytes_each for weight in self.frozen)

    @property
    def scales(self) -> int:
        """Bytes of the scales of 4-bit blocks."""
        return sum(weight.scales for weight in self.frozen)

    @property
    def trained_elements(self) -> int:
        """Elements of all that trains."""
        return sum(self.trained)

    def trained_on(self, ranks: int) -> int:
        """Elements of what trains on one of ``ranks`` ranks that share them."""
        return sum(ceil(size / ranks) for size in self.trained)

    def base_on(self, ranks: int) -> int:
        """Bytes of the base on one of ``ranks`` ranks that share it, as ZeRO-3 does."""
        return sum(weight.held(ranks) for weight in self.frozen)


def held_weights(config: Config, phantom: Phantom) -> HeldWeights:
    """The parameters of a model without memory."""
    storage = 1 if config.model.quant_storage == "uint8" else DTYPES[config.model.quant_storage].itemsize
    frozen, trained, head = [], [], 0
    for name, param in phantom.model.named_parameters():
        size = prod(param.shape)
        if param.requires_grad:
            trained.append(size)
            head += 0 if ".lora_" in name else size
        elif name in phantom.packed:
            scales = 4 * ceil(size / BLOCK) + 4 * CODE
            unpacked = size * DTYPES[config.model.dtype].itemsize
            frozen.append(FrozenWeight(ceil(ceil(size / 2) / storage), storage, scales, unpacked))
        else:
            frozen.append(FrozenWeight(size, param.element_size()))
    return HeldWeights(frozen, trained, head, _largest_layer(phantom.model))


def _largest_layer(model: nn.Module) -> int:
    sizes = [prod(p.shape) for name, p in model.named_parameters() if name.endswith(".base_layer.weight")]
    return max(sizes, default=0)
