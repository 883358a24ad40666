"""What a rank holds between steps, counted parameter by parameter."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from torch import nn

from tsqlora_scale.config.schema import Config
from tsqlora_scale.model.base_model import DTYPES
from tsqlora_scale.planning.phantom import BLOCK, Phantom

#: Elements up to which a parameter is whole on every rank: DeepSpeed's default, and ours under FSDP2.
WHOLE = 100_000
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
        rows: of its storage.
        alone: whether FSDP2 can share it: one layer has it, and calls what reads it.
        looked_up: whether it is the embedding of a model's inputs, read while nothing else is there.
    """

    elements: int
    bytes_each: int
    scales: int = 0
    unpacked: int = 0
    rows: int = 1
    alone: bool = True
    looked_up: bool = False

    @property
    def whole(self) -> int:
        """Bytes of all of it."""
        return self.elements * self.bytes_each

    def held(self, ranks: int, *, whole_up_to: int = WHOLE) -> int:
        """Bytes on one of ``ranks`` ranks that share it, as ZeRO-3 does.

        Args:
            whole_up_to: elements of weights that are not shared.
        """
        shared = self.elements > whole_up_to
        return (ceil(self.elements / ranks) if shared else self.elements) * self.bytes_each

    def held_rows(self, ranks: int, *, whole_below: int = WHOLE) -> int:
        """Bytes on the first of ``ranks`` ranks, as FSDP2 shares it: by rows."""
        shared = self.alone and self.elements >= whole_below
        return self.whole // self.rows * ceil(self.rows / ranks) if shared else self.whole


@dataclass(frozen=True)
class HeldWeights:
    """The parameters of a run.

    Attributes:
        frozen: the base.
        trained: elements of each parameter that trains: factors and head.
        largest_layer: elements of the largest adapted layer's weight.
        inputs: of all adapted layers together, d_in each.
    """

    frozen: Sequence[FrozenWeight]
    trained: Sequence[int]
    largest_layer: int
    inputs: int = 0

    @property
    def base(self) -> int:
        """Bytes of the base, whole."""
        return sum(weight.whole for weight in self.frozen)

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


def held_weights(config: Config, phantom: Phantom) -> HeldWeights:
    """The parameters of a model without memory."""
    storage = 1 if config.model.quant_storage == "uint8" else DTYPES[config.model.quant_storage].itemsize
    frozen, trained = [], []
    inputs = _input_embeddings(phantom.model)
    alone = _shared_by_fsdp(phantom.model, inputs)
    looked_up = {id(param) for owner in inputs for param in owner.parameters(recurse=False)}
    for name, param in phantom.model.named_parameters():
        size = prod(param.shape)
        if param.requires_grad:
            trained.append(size)
        elif name in phantom.packed:
            scales = 4 * ceil(size / BLOCK) + 4 * CODE
            unpacked = size * DTYPES[config.model.dtype].itemsize
            elements = ceil(ceil(size / 2) / storage)  # a column of them
            frozen.append(FrozenWeight(elements, storage, scales, unpacked, elements, id(param) in alone))
        else:
            rows = param.shape[0] if param.dim() else 1
            is_alone, is_first = id(param) in alone, id(param) in looked_up
            frozen.append(FrozenWeight(size, param.element_size(), rows=rows, alone=is_alone, looked_up=is_first))
    layers = [layer for name, layer in phantom.model.named_modules() if name.endswith(".base_layer")]
    sizes = [prod(layer.weight.shape) for layer in layers if isinstance(layer.weight, nn.Parameter)]
    adapted = [layer for layer in phantom.model.modules() if hasattr(layer, "base_layer")]
    fed = sum(int(getattr(layer, "in_features", 0)) for layer in adapted)
    return HeldWeights(frozen, trained, max(sizes, default=0), fed)


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    found: dict[int, nn.Module] = {}
    module: Any
    for module in model.modules():
        if hasattr(module, "get_input_embeddings"):
            with suppress(NotImplementedError, AttributeError):  # of models that have none
                embeddings = module.get_input_embeddings()
                found[id(embeddings)] = embeddings
    return list(found.values())


def _shared_by_fsdp(model: nn.Module, inputs: Collection[nn.Module]) -> set[int]:
    """Ids of what :mod:`tsqlora_scale.engine.fsdp_internals` shares: what one layer owns, but for embeddings of
    positions."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(id(param), []).append(module)
    return {
        param
        for param, (owner, *others) in owners.items()
        if not others and (not isinstance(owner, nn.Embedding) or owner in inputs)
    }
