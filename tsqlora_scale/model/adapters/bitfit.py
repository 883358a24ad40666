"""BitFit (Ben Zaken et al. 2022): the biases that a base has, and nothing else of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.engine.sharded import whole_shape
from tsqlora_scale.model.adapters.own_type import OwnAdapter


def bias_names(model: nn.Module) -> set[str]:
    """The vectors that are added to something: of linear layers, norms, and (DeBERTa) of queries and values."""
    return {
        name
        for name, param in model.named_parameters()
        if len(whole_shape(param)) == 1 and (name.rsplit(".", 1)[-1] == "bias" or name.endswith("_bias"))
    }


class BitFitAdapter(OwnAdapter):
    """``adapter.type: bitfit``."""

    name = "bitfit"

    def place(self, base: nn.Module, r: int, generator: torch.Generator) -> None:
        """Nothing: new biases are not invented."""

    def chosen(self, model: nn.Module, unreached: Collection[str]) -> set[str]:
        """All biases that the logits depend on."""
        return {
            name for name in bias_names(model) if name not in unreached and name.rpartition(".")[0] not in unreached
        }

    def check(self, model: Any) -> None:
        """Raises:
        UserError: the model's body has no biases; those of its head are trained by every method.
        """
        if not bias_names(getattr(model, model.base_model_prefix, model)):
            raise UserError(
                f"adapter.type='bitfit': a {model.config.model_type} model has no biases, and new ones would be "
                "another method; choose adapter.type=lora"
            )
