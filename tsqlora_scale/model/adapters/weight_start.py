"""Factors that start as a part of the weight they stand beside, which loses it: PiSSA (2404.02948), OLoRA (2406.01775).

The base is then another one. What is saved is for the base as it was: beside the trained factors of a layer it has
those of the start, with the opposite sign, as PEFT converts such adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from tsqlora_scale.engine.sharded import read_parameter, write_parameter

#: A layer's factors at the start, as attributes of it; no engine moves or trains them.
START = ("start_A", "start_B")


def leading_factors(weight: Tensor, rank: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) in float32, with ``scaling`` B A the part of ``weight`` that they take over.

    Args:
        weight: (d_out, d_in), float32.
        init: ``pissa``, the r leading singular triplets, divided evenly; ``olora``, the first r columns of Q and rows
            of R of its QR decomposition.
    """
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def start_in_weights(layers: Mapping[str, LoraLayer], adapter: str, init: str) -> None:
    """Take factors out of the weights of ``layers``. With ZeRO-3 a collective."""
    layer: Any
    for layer in layers.values():
        base: Any = layer.get_base_layer()
        lies_across = isinstance(base, Conv1D)
        weight = read_parameter(base.weight).float()
        weight = weight.T if lies_across else weight
        a, b = leading_factors(weight, layer.r[adapter], layer.scaling[adapter], init)
        rest = weight - layer.scaling[adapter] * (b @ a)
        write_parameter(base.weight, (rest.T if lies_across else rest).to(base.weight.dtype))
        layer.lora_A[adapter].weight.data.copy_(a)
        layer.lora_B[adapter].weight.data.copy_(b)
        layer.start_A, layer.start_B = a.cpu().contiguous(), b.cpu().contiguous()


def start_values(layers: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    """The factors of the start by name; none where they were drawn."""
    return {
        f"{name}.{side}": getattr(layer, side)
        for name, layer in layers.items()
        for side in START
        if hasattr(layer, side)
    }


def joined(values: Mapping[str, Tensor], place: Mapping[str, Any]) -> Tensor:
    """A factor of the adapter for the base as it was.

    Args:
        values: by name.
        place: ``start``, the name of the factor of the start; ``side``, A or B; and ``trained``, the name of the
            trained one, or none where the layer has lost its rank; ``times``, what B is multiplied by, if anything.
    """
    start = values[place["start"]]
    start = -start if place["side"] == "B" else start
    own = [values[place["trained"]]] if place["trained"] else []
    whole = torch.cat([*own, start.to(own[0]) if own else start], dim=0 if place["side"] == "A" else 1)
    return whole * place["times"] if "times" in place else whole
