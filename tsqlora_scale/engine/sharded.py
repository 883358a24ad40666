"""Read and write parameters that may be sharded, by ZeRO-3 or by FSDP2."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tsqlora_scale.engine import fsdp_internals, zero_internals


def has_shards(module: nn.Module) -> bool:
    """Whether ZeRO-3 or FSDP2 holds the parameters: every forward is then a collective."""
    return fsdp_internals.is_sharded_module(module) or any(hasattr(param, "ds_id") for param in module.parameters())


def write_parameter(param: nn.Parameter, value: torch.Tensor) -> None:
    """Set a parameter, whole or sharded. Of a sharded one a collective; rank 0's ``value`` wins.

    Args:
        value: the full tensor, of the parameter's whole shape.
    """
    assert value.shape == whole_shape(param), (value.shape, whole_shape(param))  # copy_ would spread a smaller one
    if fsdp_internals.is_sharded(param):
        fsdp_internals.write(param, value)
        return
    if not hasattr(param, "ds_id"):
        param.data.copy_(value)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
        param.data.copy_(value)


def read_parameter(param: nn.Parameter) -> torch.Tensor:
    """A copy of a parameter's whole value. Of a sharded one a collective."""
    if fsdp_internals.is_sharded(param):
        return fsdp_internals.whole(param)
    if not hasattr(param, "ds_id") or zero_internals.is_in_use(param):
        return param.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([param]):
        return param.detach().clone()


def whole_shape(param: nn.Parameter) -> torch.Size:
    """The shape of a parameter's whole value."""
    shape: torch.Size = getattr(param, "ds_shape", param.shape)
    return shape


def lasting(weight: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """A weight of ``module``, whole at the moment, that is to outlast the module's pass.

    FSDP2 empties the memory of a weight that it lets go, whoever looks at it; ZeRO-3 puts another in its place.
    """
    return weight.clone() if fsdp_internals.is_sharded_module(module) else weight


def is_sharded(param: Any) -> bool:
    """Whether this rank keeps only a part of the parameter, between its uses."""
    return fsdp_internals.is_sharded(param) or zero_internals.is_sharded(param)


def held_part(param: Any) -> torch.Tensor:
    """What this rank holds of a parameter between its uses: its shard, or all of it."""
    if fsdp_internals.is_sharded(param):
        return fsdp_internals.held_part(param)
    return zero_internals.held_part(param)
