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


def row_with_prompt(row: list[int], real: list[int], between: list[int], *, behind_first: bool) -> list[int]:
    """A padded row of tokens with a prompt's before its text, or behind the text's first token; pads where they were.

    Args:
        real: 1 where a token is of the text, and 0 where it is padding, on one side.
    """
    before: list[int] = []
    left = list(row)
    while left and not real[len(before)] and any(real):
        before.append(left.pop(0))
    if behind_first and left:
        before.append(left.pop(0))
    return [*before, *between, *left]


def attention_with_prefix(
    query: Tensor, keys: list[Tensor], values: list[Tensor], visible: list[bool], prefix: tuple[Tensor, Tensor]
) -> Tensor:
    """What one query (d,) of one head gets: the mean of the visible values and of the prefix's, by exp(q k / sqrt(d)).

    Args:
        prefix: keys (P, d) and values (P, d).
    """
    pairs = list(zip(prefix[0], prefix[1], strict=True))
    pairs += [(k, v) for k, v, seen in zip(keys, values, visible, strict=True) if seen]
    weights = [math.exp(query.double().dot(k.double()).item() / math.sqrt(len(query))) for k, _ in pairs]
    out = torch.zeros(len(values[0]), dtype=torch.float64)
    for weight, (_, v) in zip(weights, pairs, strict=True):
        out += weight / sum(weights) * v.double()
    return out
