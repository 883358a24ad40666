"""A model in which something trains that is no adapter of PEFT's, under the names that PEFT gives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tsqlora_scale.engine.sharded import read_parameter, whole_shape
from tsqlora_scale.model.weight_files import PREFIX


class PlacedModel(nn.Module):
    """A base model as ``base_model.model``, as PEFT wraps one; whatever else is asked for is the base's.

    Attributes:
        whole_modules: names of the base's modules that train whole, heads mostly.
    """

    def __init__(self, base: nn.Module, whole_modules: Iterable[str] = ()) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": base})
        self.whole_modules = list(whole_modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's, in which the adapter stands."""
        return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's."""
        return self.get_base_model().generate(*args, **kwargs)

    def get_base_model(self) -> Any:
        """The model that is wrapped."""
        return self.base_model["model"]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not yet there
                raise
            return getattr(self.get_base_model(), name)


def in_whole_module(name: str, whole_modules: Iterable[str]) -> bool:
    """Whether a parameter of a wrapped model is of one of the base's modules."""
    inner = name.removeprefix(PREFIX)
    return any(inner.startswith(f"{module}.") for module in whole_modules)


def make_float32(model: nn.Module) -> None:
    """Let every parameter that trains be one in float32, tied ones still one. With ZeRO-3 a collective.

    One that is in float32 already stays where it is, sharded or not. What a norm has beside it comes along: their
    kernels take no two types.
    """
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        trains = any(param.requires_grad for param in own.values())
        is_norm = all(len(whole_shape(param)) == 1 for param in own.values())  # of a shard's all are
        for name, param in own.items():
            if param.dtype == torch.float32 or not (param.requires_grad or (trains and is_norm)):
                continue
            if id(param) not in done:
                done[id(param)] = nn.Parameter(read_parameter(param).float(), requires_grad=param.requires_grad)
            module.register_parameter(name, done[id(param)])
