"""AdaLoRA's form of LoRA (2303.10512): a diagonal between the factors, trained like them, without a use of SVDs.

dW = B diag(E) A. PEFT's LoRA layers do the rest: one more module stands between ``lora_A`` and ``lora_B``. PEFT's own
AdaLoRA layers are not used, as they divide by a rank that their file does not keep, hold their factors outside of
modules (ZeRO-3 gathers by module, and samples' gradients are taken at modules), and no other program reads their files.
What is saved is a plain LoRA adapter, B diag(E) as its B; a file beside it keeps E, so that it can be taken apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.model.adapters.adapter_files import DIAGONALS
from tsqlora_scale.model.adapters.lora import ADAPTER, LoraAdapter, lora_layers
from tsqlora_scale.model.adapters.placement import Placement
from tsqlora_scale.model.weight_files import read_json

#: Standard deviation of both factors' elements at the start, AdaLoRA's.
INITIAL_STD = 0.02


class Diagonal(nn.Module):
    """E, (r,): multiplies the last dimension."""

    def __init__(self, rank: int, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(…, r) -> (…, r)."""
        return x * self.weight


class TripletVariant(LoraVariant):  # type: ignore[misc]
    """What PEFT's LoRA layers of every kind, 4-bit ones too, call in the place of B(A(x))."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The base's output, and s B(E * A(x)) beside it."""
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        middle = module.lora_E[active_adapter](a(module.lora_dropout[active_adapter](x)))
        return cast(Tensor, result + b(middle) * module.scaling[active_adapter])


def diagonals_of(layer: LoraLayer) -> nn.ModuleDict | None:
    """Of a layer whose components are triplets, be it that none is left, the module that holds E; None of any other."""
    found = getattr(layer, "lora_E", None)
    return found if isinstance(found, nn.ModuleDict) else None


def add_diagonal(layer: LoraLayer, diagonal: Diagonal) -> None:
    """Make the layer's components triplets."""
    diagonals = diagonals_of(layer)
    if diagonals is None:
        diagonals = nn.ModuleDict()
        cast(Any, layer).lora_E = diagonals
    diagonals[ADAPTER] = diagonal
    layer.lora_variant[ADAPTER] = TripletVariant()


class SvdAdapter(LoraAdapter):
    """``adapter.type: svd``. See :class:`~tsqlora_scale.model.adapters.adapter_type.AdapterType`.

    Scores are taken of A and B, which are linear modules; E is left out of theta, as a head is.
    """

    name = "svd"
    peft_writes = False

    def build(self, base: nn.Module, placement: Placement) -> PeftModel:
        """As for LoRA, but A and B are drawn alike from a normal distribution, and E is zero."""
        model = super().build(base, placement)
        for layer in lora_layers(model).values():
            weights = [cast(nn.Parameter, factors[ADAPTER].weight) for factors in (layer.lora_A, layer.lora_B)]
            for weight in weights:
                weight.data.copy_(torch.empty(weight.shape).normal_(0.0, INITIAL_STD, generator=placement.generator))
            add_diagonal(layer, Diagonal(layer.r[ADAPTER], device=weights[0].device))
        return model

    def describe(
        self, model: nn.Module, values: Mapping[str, torch.Tensor], *, base_name: str, revision: str | None = None
    ) -> dict[str, Any]:
        """As for LoRA, and which diagonal goes into which factor."""
        diagonals = {name: name.replace(".lora_B.", ".lora_E.") for name in values if ".lora_B." in name}
        factors = {name: value for name, value in values.items() if ".lora_E." not in name}
        described = super().describe(model, factors, base_name=base_name, revision=revision)
        return {**described, "diagonals": diagonals}

    def _tensors(self, folder: Path) -> dict[str, torch.Tensor]:
        """The file's tensors, its B taken apart into B and E.

        In a file that no triplets were written to, the lengths of B's columns become E. Where E is zero nothing says
        what B was: such a component keeps its zero in B, and is given the E of the others, so that it can learn.
        """
        tensors = super()._tensors(folder)
        place = folder / DIAGONALS
        kept = read_json(place) if place.is_file() else {}
        for key in [key for key in tensors if ".lora_B." in key]:
            product = tensors[key].float()
            e = torch.linalg.vector_norm(product, dim=0)
            if key in kept:
                e = torch.tensor(kept[key], dtype=torch.float32)
                if e.shape != product.shape[1:]:
                    raise UserError(
                        f"{place}: {key} has {len(e)} numbers, its factor has {product.shape[1]}; give the folder that "
                        "a run wrote, or remove the file"
                    )
            usual = float(e.abs().mean()) if bool(e.any()) else 1.0
            e = torch.where(e == 0, usual, e)
            tensors[key], tensors[key.replace(".lora_B.", ".lora_E.")] = product / e, e
        return tensors
