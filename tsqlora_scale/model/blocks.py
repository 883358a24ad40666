"""The repeated blocks of a model, and which of their linear layers do what: by names, as no two architectures agree."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.model.block_depths import block_of
from tsqlora_scale.model.linear_layers import expert_kind, linear_layers, outside_linear_layers

#: Last parts of the names of layers that make the values of attention, where these have a layer of their own.
VALUES = ("value", "value_proj", "v_proj", "v_lin", "v")
#: Of the gate beside a feed-forward block's first matrix, which the two-matrix block of the papers has not.
GATES = ("gate_proj", "gate", "w1_gate")


def block_names(model: nn.Module) -> list[str]:
    """The outermost repeated blocks with linear layers in them, in the model's order: ``bert.encoder.layer.0``."""
    found = (block_of(name) for name in linear_layers(model))
    return list(dict.fromkeys(name for name in found if name is not None))


def hidden_size(model: Any) -> int:
    """The width of a block's output.

    Raises:
        UserError: the model's config does not say it.
    """
    size = getattr(model.config.get_text_config(), "hidden_size", None)
    if not isinstance(size, int):
        raise UserError(
            f"a {model.config.model_type} model does not say how wide its blocks' outputs are (hidden_size), by which "
            "this adapter.type is built; choose adapter.type=lora"
        )
    return size


def out_features(layer: Any) -> int:
    """Width of a linear layer's output, whichever way its weight lies, packed and sharded ones included."""
    return int(layer.out_features if hasattr(layer, "out_features") else layer.nf)


def attention_of(name: str) -> str | None:
    """The attention module that a layer lies in; None for one of a feed-forward block."""
    parts = name.split(".")
    where = [number for number, part in enumerate(parts) if re.search("attn|attention", part, re.IGNORECASE)]
    return ".".join(parts[: where[0] + 1]) if where else None


def outputs(model: Any) -> tuple[list[str], list[str]]:
    """The linear layers that attention, and those that feed-forward blocks end in, in the model's order.

    Of the layers of an attention module, or of what is left of a block, it is the last of the blocks' width.

    Raises:
        UserError: some block has none that can be told.
    """
    width, layers = hidden_size(model), linear_layers(model)
    blocks = block_names(model)
    inner = (name for name in layers if any(name.startswith(f"{block}.") for block in blocks))
    if outside_linear_layers(model) or any(expert_kind(name) != name for name in inner):
        raise UserError(
            f"the feed-forward blocks of a {model.config.model_type} model are experts, after which no bottleneck "
            "fits; choose adapter.type=lora"
        )
    attention: dict[str, str] = {}
    feed_forward: dict[str, str] = {}
    for block in blocks:
        for name in (name for name in layers if name.startswith(f"{block}.")):
            if out_features(layers[name]) == width:
                inside = attention_of(name)
                (feed_forward if inside is None else attention)[inside or block] = name
    missing = [block for block in blocks if block not in feed_forward]
    missing += [block for block in blocks if not any(name.startswith(f"{block}.") for name in attention)]
    if missing or not blocks:
        raise UserError(
            f"of a {model.config.model_type} model it cannot be told which layers attention and feed-forward blocks "
            f"end in ({missing[0] if missing else 'it has no blocks'}); choose adapter.type=lora"
        )
    return list(attention.values()), list(feed_forward.values())


def papers_choice(model: Any, layers: Iterable[str]) -> list[str]:
    """LoRATRF's choice among linear layers of blocks (2412.09827): the feed-forward block's two matrices, and of models
    that only decode the output of attention (its Fig. 2, of LLaMA), of others the values (its Table 1, of DeBERTa).

    Args:
        layers: names, none of which is idle.

    Raises:
        UserError: there is no such layer.
    """
    inside = [name for name in layers if attention_of(name) is not None]
    chosen = [name for name in layers if attention_of(name) is None and name.rsplit(".", 1)[-1] not in GATES]
    decodes = "CausalLM" in type(model).__name__ or type(model).__name__.endswith("LMHeadModel")
    if decodes:
        last = {attention_of(name): name for name in inside}
        beside = list(last.values())
    else:
        beside = [name for name in inside if name.rsplit(".", 1)[-1] in VALUES]
    if not beside or not chosen:
        what = "feed-forward layer" if beside else "output of attention" if decodes else "layer for the values alone"
        raise UserError(
            f"adapter.target_modules='loratrf': {type(model).__name__} has no {what}; name the layers, or set auto"
        )
    return sorted([*beside, *chosen])
