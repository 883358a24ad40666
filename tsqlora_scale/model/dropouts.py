"""The parts of a model's config that leave something out by chance, or make evaluation another function."""

from __future__ import annotations

from typing import Any

from tsqlora_scale.common.errors import UserError


def set_dropout(model_config: Any, probability: float) -> None:
    """Give every dropout that a model's config knows the same probability (layer dropout is not one).

    Raises:
        UserError: when there is none to set.
    """
    found = False
    for part in {id(c): c for c in (model_config, model_config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            is_one = "dropout" in name or name.endswith("pdrop")
            if is_one and (value is None or (isinstance(value, int | float) and not isinstance(value, bool))):
                setattr(part, name, probability)
                found = True
    if not found and probability:
        raise UserError(
            f"model.dropout={probability}: a {model_config.model_type} model has no dropout; leave it out, "
            "or set adapter.dropout"
        )


def set_layer_drop(model_config: Any) -> list[str]:
    """Let no layer be left out by chance in training (LayerDrop, 1909.11556): under DDP a layer that a step leaves out
    is an error, and ranks of ZeRO-3 would gather different layers.

    Returns:
        What was above 0, as ``key=value``.
    """
    changed = []
    parts = [model_config, *(getattr(model_config, name, None) for name in getattr(model_config, "sub_configs", {}))]
    for part in parts:
        for name, value in [] if part is None else part.to_dict().items():
            if name.endswith(("layerdrop", "layer_drop")) and isinstance(value, int | float) and value:
                setattr(part, name, 0.0)
                changed.append(f"{name}={value}")
    return changed


def set_no_rescaling(model_config: Any) -> None:
    """Let evaluation compute with the weights of training: RWKV halves those of some layers for it (and the hidden
    states with them, so that fp16 does not overflow), and knows nothing of an adapter on them or of packed weights.
    """
    if getattr(model_config, "rescale_every", 0):
        model_config.rescale_every = 0
