"""Weights that two layers share, of which one is changed by a merge: the merged model has to hold both."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.model.generation_files import save_model

Ties = list[list[str]]


def ties_of(model: nn.Module) -> Ties:
    """Names of parameters that are one and the same, group by group."""
    groups: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(param), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def untie_adapted(adapted: nn.Module) -> None:
    """Give every adapted layer a weight of its own, so that a merge into it changes no other layer's."""
    users: dict[int, int] = {}
    for module in adapted.modules():
        for param in module.parameters(recurse=False):
            users[id(param)] = users.get(id(param), 0) + 1
    for layer in adapted.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base: Any = layer.get_base_layer()
        for name, param in list(base.named_parameters(recurse=False)):
            if users[id(param)] > 1:
                base.register_parameter(name, nn.Parameter(param.detach().clone(), requires_grad=False))


def is_untied(model: nn.Module, ties: Ties) -> bool:
    """Whether parameters of a group are not the same any more."""
    params = dict(model.named_parameters(remove_duplicate=False))
    return any(params[name] is not params[names[0]] for names in ties for name in names)


def set_tying(model_config: Any, value: bool) -> None:
    """``tie_word_embeddings`` of a model's config and of its parts, where it is there."""
    parts = [getattr(model_config, name, None) for name in getattr(model_config, "sub_configs", {})]
    for part in [model_config, *parts]:
        if getattr(part, "tie_word_embeddings", None) is not None:
            part.tie_word_embeddings = value


def save_untied(model: Any, ties: Ties, out: Path, *, key: str) -> None:
    """Save a model whose ties a merge has broken, so that it is read as what it is.

    Some models scale what goes into a tied head (T5, by 1 / sqrt(d_model)) and do not where their config says that it
    is not tied: then the head takes the factor. What is saved is opened again and compared.

    Args:
        key: what to name in an error.

    Raises:
        UserError: this architecture cannot be read without its ties.
    """
    set_tying(model.config, True)
    expected = _logits(model)
    set_tying(model.config, False)
    params = dict(model.named_parameters(remove_duplicate=False))
    for name in {name for names in ties for name in names[1:] if params[name] is params[names[0]]}:
        module, _, inner = name.rpartition(".")
        setattr(model.get_submodule(module), inner, nn.Parameter(params[name].detach().clone(), requires_grad=False))
    width = getattr(model.config.get_text_config(), "hidden_size", 1)
    for factor in (1.0, 1 / math.sqrt(width)):
        head = model.get_output_embeddings()
        if factor != 1 and head is not None:
            head.weight.data.mul_(factor)
        save_model(model, out)
        opened = type(model).from_pretrained(str(out), dtype=model.dtype).to(model.device)
        found = _logits(opened)
        del opened
        if torch.allclose(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max())):
            return
    raise UserError(
        f"{key}: a {model.config.model_type} model cannot be read without the weights that its layers share, and the "
        "adapter changes one of them; export it as peft, or train without that layer in adapter.target_modules"
    )


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Of a few tokens, (1, T, vocabulary) float32."""
    ids = torch.arange(4, 12, device=model.device)[None] % model.config.get_text_config().vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    found: Tensor = model.eval()(**inputs).logits.float()
    return found
