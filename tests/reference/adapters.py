"""Slow, obvious versions of the modules that ``tsqlora_scale.model.adapters`` puts into a model: a token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def task_filter(hidden: Tensor, task: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """LoRATRF's Eq. 4 and 5 of every token of ``hidden`` (B, T, d), in float64; ``T = up @ down``."""
    matrix = up.double() @ down.double()
    out = hidden.double().clone()
    for row in range(len(hidden)):
        for place in range(hidden.shape[1]):
            token, wanted = hidden[row, place].double(), task.double()
            length = token.norm().item() * wanted.norm().item()
            cosine = token.dot(wanted).item() / length if length else 0.0
            out[row, place] += matrix @ (min(max(cosine, 0.0), 1.0) * token)
    return out


def bottleneck(hidden: Tensor, down: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor], act: str) -> Tensor:
    """``h + W2 act(W1 h + b1) + b2`` of every token, in float64."""
    of_number: Callable[[float], float] = {
        "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
        "relu": lambda x: max(x, 0.0),
    }[act]
    out = hidden.double().clone()
    for row in range(len(hidden)):
        for place in range(hidden.shape[1]):
            narrow = down[0].double() @ hidden[row, place].double() + down[1].double()
            active = torch.tensor([of_number(x) for x in narrow.tolist()], dtype=torch.float64)
            out[row, place] += up[0].double() @ active + up[1].double()
    return out
