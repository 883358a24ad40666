"""Read and write parameters that may be sharded by ZeRO-3."""

from __future__ import annotations

import torch
from torch import nn


def has_shards(module: nn.Module) -> bool:
    """Whether ZeRO-3 holds the parameters: every forward is then a collective."""
    return any(hasattr(param, "ds_id") for param in module.parameters())


def write_parameter(param: nn.Parameter, value: torch.Tensor) -> None:
    """Set a parameter, whole or sharded. With ZeRO-3 a collective; rank 0's ``value`` wins.

    Args:
        value: the full tensor, of the parameter's whole shape.
    """
    if not hasattr(param, "ds_id"):
        param.data.copy_(value)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
        param.data.copy_(value)


def read_parameter(param: nn.Parameter) -> torch.Tensor:
    """A copy of a parameter's whole value. With ZeRO-3 a collective."""
    if not hasattr(param, "ds_id"):
        return param.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([param]):
        return param.detach().clone()


def whole_shape(param: nn.Parameter) -> torch.Size:
    """The shape of a parameter's whole value."""
    shape: torch.Size = getattr(param, "ds_shape", param.shape)
    return shape
