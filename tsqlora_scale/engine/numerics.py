"""What makes engines agree to the last bit where their arithmetic allows it, not only to a tolerance.

A run decides: which sample is drawn, which layer gets the next rank. Two engines whose gradients differ in the last
bit agree on these decisions for some dozens of steps, then one falls differently, and the runs part. In fp32 on two
ranks, DDP, ZeRO-2 and ZeRO-3 differ in three places only: ZeRO-3's linear function (:mod:`tsqlora_scale.engine.zero`),
and the two below.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

#: Significant bits of a gradient norm that clipping sees; 8 are a step of 0.4 % at most.
NORM_BITS = 8


def fix_summation_order(module: nn.Module) -> None:
    """Let autograd add up the gradients of a tensor that is used several times in one order on every engine.

    ZeRO-3 puts a node of its own between every module and its inputs, so that what a module contributes to its input's
    gradient is added up first, and then to what others contribute. Elsewhere all contributions are added one after
    another. With a node that does nothing at the same places the sums have the same order. Primitives of ``torch.nn``
    use their input once and need none.

    Costs 5 to 10 microseconds a module and forward pass. It is not used on a GPU, where engines do not agree to the bit
    in any case.
    """
    for part in module.modules():
        if next(part.children(), None) is not None or not type(part).__module__.startswith("torch.nn"):
            part.register_forward_pre_hook(_own_node)


def _own_node(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.view_as(x) if isinstance(x, torch.Tensor) and x.requires_grad else x for x in inputs)


def rounded_norm(norm: torch.Tensor) -> torch.Tensor:
    """A gradient norm () with its last bits dropped, float32, for clipping.

    Engines add up squares in different orders: unrounded, the last bit of the norm would reach every parameter.
    """
    mantissa, exponent = torch.frexp(norm.float())
    rounded = torch.ldexp((mantissa * 2**NORM_BITS).round() / 2**NORM_BITS, exponent)
    return torch.where(norm.isfinite(), rounded, norm.float())


def clip_gradients(params: Iterable[nn.Parameter], norm: torch.Tensor, max_norm: float) -> None:
    """Scale gradients of 2-norm ``norm`` down to ``max_norm``, in DeepSpeed's order of operations."""
    excess = ((rounded_norm(norm) + 1e-6) / max_norm).clamp(min=1.0)
    gradients = [param.grad for param in params if param.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, 1.0 / excess)  # some kernels on a GPU, not two a tensor
