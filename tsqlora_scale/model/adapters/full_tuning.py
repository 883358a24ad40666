"""Full fine-tuning, the row that all tables compare with: every parameter that the logits depend on."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from tsqlora_scale.model.adapters.own_type import OwnAdapter


class FullTuning(OwnAdapter):
    """``adapter.type: full``."""

    name = "full"

    def place(self, base: nn.Module, r: int, generator: torch.Generator) -> None:
        """Nothing."""

    def chosen(self, model: nn.Module, unreached: Collection[str]) -> set[str]:
        """All that the logits depend on."""
        names = (name for name, param in model.named_parameters() if param.is_floating_point())
        return {name for name in names if name not in unreached and name.rpartition(".")[0] not in unreached}

    def check(self, model: nn.Module) -> None:
        """Every model has parameters."""
