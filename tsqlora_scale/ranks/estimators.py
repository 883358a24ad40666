"""What one group of samples says about one linear layer, from its inputs and the gradients of its outputs.

For a linear layer the weight's gradient over a group is G = sum over rows of delta_t x_t^T, whatever the leading
dimensions are. Everything here works on rows: x (N, d_in), delta (N, d_out), G (d_out, d_in).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rows(tensor: Tensor) -> Tensor:
    """(…, d) -> (N, d)."""
    return tensor.reshape(-1, tensor.shape[-1])


def weight_gradient(x: Tensor, delta: Tensor) -> Tensor:
    """G = delta^T x in float32, (d_out, d_in).

    Multiplied in the type of the operands, where matrix units are fast; in float32 when the two differ, and for
    float16, whose range a sum over tokens can leave.
    """
    if x.dtype != delta.dtype or x.dtype == torch.float16:
        x, delta = x.float(), delta.float()
    return (rows(delta).T @ rows(x)).float()


def mean_abs_product(gradient: Tensor, weight: Tensor) -> Tensor:
    """Eq. 3: mean over elements of |W * G|. Overwrites ``gradient``: the product needs no second matrix."""
    return gradient.mul_(weight).abs_().mean().double()


def squared_norm(gradient: Tensor) -> Tensor:
    """Eq. 4's trace: ||G||_F^2. Overwrites ``gradient``."""
    return gradient.mul_(gradient).sum().double()


def ghost_squared_norm(x: Tensor, delta: Tensor) -> Tensor:
    """||G||_F^2 = sum over t, t' of (delta_t . delta_t') (x_t . x_t'), without forming G (N x N instead)."""
    x, delta = rows(x).float(), rows(delta).float()
    return torch.sum((x @ x.T).mul_(delta @ delta.T), dtype=torch.float64).clamp_(min=0)


def gradient_sketch(x: Tensor, delta: Tensor, projection: Tensor) -> Tensor:
    """Omega G, (k, d_in) float32, without forming G: (Omega delta^T) x, of k N (d_in + d_out) multiplications."""
    return (projection @ rows(delta).float().T) @ rows(x).float()


def ghost_is_cheaper(x: Tensor, delta: Tensor) -> bool:
    """N^2 (d_in + d_out) multiplications against N d_in d_out."""
    count, d_in, d_out = rows(x).shape[0], x.shape[-1], delta.shape[-1]
    return count * (d_in + d_out) < d_in * d_out


def full_weight(linear: nn.Module, *, transposed: bool = False) -> Tensor:
    """The frozen weight as (d_out, d_in), in its own float type; a 4-bit weight is dequantised into a new tensor.

    Called inside the backward pass, where a sharded weight is whole.
    """
    weight: Tensor = linear.weight  # type: ignore[assignment]
    state = getattr(weight, "quant_state", None) or getattr(linear, "quant_state", None)
    if state is None:
        return weight.detach().T if transposed else weight.detach()
    from bitsandbytes.functional import dequantize_4bit  # only a 4-bit layer needs it, and importing it is slow

    return dequantize_4bit(weight.data, state)
