"""The model with its adapter as a run builds it, of tensors that take no memory.

Everything of them but the values is there: shapes, types, and which kernels a CPU would take. So a pass through them
tells what a real pass keeps, for any architecture, in seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tsqlora_scale.common.quiet import quiet_libraries
from tsqlora_scale.config.schema import Config
from tsqlora_scale.model.adapters.adapter_type import adapter_type
from tsqlora_scale.model.adapters.placement import Placement
from tsqlora_scale.model.base_model import DTYPES, skeleton
from tsqlora_scale.model.heads import has_head, head_modules
from tsqlora_scale.model.linear_layers import heads_of, linear_layers, read_past
from tsqlora_scale.tasks.objective_names import objective_class

#: Weights that share a scale in a 4-bit base.
BLOCK = 64


@dataclass(frozen=True)
class Phantom:
    """A model of tensors without memory.

    Attributes:
        model: with its adapter; only usable inside ``mode``.
        mode: makes new tensors such ones.
        packed: names of the weights that are 4-bit in the run.
    """

    model: Any
    mode: FakeTensorMode
    packed: frozenset[str]


def build_phantom(config: Config, model_config: Any, *, checkpointing: bool, unreached: Collection[str]) -> Phantom:
    """The model of a run.

    Args:
        model_config: of :func:`.describe_model`; stays as it is.
        checkpointing: in the place of ``model.gradient_checkpointing``.
        unreached: linear layers that the logits do not depend on (:mod:`tsqlora_scale.model.probe`).
    """
    objective: Any = objective_class(config.task)
    described = copy.deepcopy(model_config)
    described.dtype = DTYPES[config.model.dtype]
    described.quantization_config = None
    if getattr(described, "pad_token_id", None) is None:
        described.pad_token_id = 0
    with quiet_libraries():
        attention = {} if config.model.attention == "auto" else {"attn_implementation": config.model.attention}
        trust = config.model.trust_remote_code
        base: Any = skeleton(objective.auto_class, described, trust_remote_code=trust, **attention)
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if getattr(base.config, "use_cache", None):
            base.config.use_cache = False
        packed = packed_weights(base) if config.model.quantization == "nf4" else set()
        head = head_modules(base) if has_head(objective.peft_task_type) else []
        with torch.random.fork_rng(devices=[]):
            placement = Placement(
                config.adapter.model_copy(update={"init": "default"}),  # others compute values, of which there are none
                task_type=objective.peft_task_type,
                new_modules=sorted(head),
                dtype=config.model.dtype,
                generator=torch.Generator(),
                unreached=unreached,
            )
            model = adapter_type(config.adapter.type).build(base, placement)
    names = frozenset(name for name, param in model.named_parameters() if id(param) in packed)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _take_no_memory(model)
    return Phantom(model, mode, names)


def packed_weights(base: nn.Module) -> set[int]:
    """Ids of the weights that a 4-bit base packs: of all linear layers of torch's but those kept in floating point."""
    kept = {*heads_of(base), *read_past(base)}
    return {id(layer.weight) for name, layer in linear_layers(base).items() if name not in kept}


def _take_no_memory(model: nn.Module) -> None:
    """Exchange everything that lies on the meta device for a tensor of the mode that is on, on the CPU."""
    done: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if id(param) not in done:
                done[id(param)] = nn.Parameter(_like(param), requires_grad=param.requires_grad)
            module._parameters[name] = done[id(param)]
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = _like(buffer)
        # rotary embeddings keep a second name of a buffer
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.is_meta:
                setattr(module, name, _like(value))


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
