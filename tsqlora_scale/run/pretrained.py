"""What a run on plain text leaves to the run of the task after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tsqlora_scale.engine.sharded import whole_shape, write_parameter
from tsqlora_scale.ranks import current_ranks, set_ranks


def write_values(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Set parameters by name. With ZeRO-3 a collective."""
    params = dict(model.named_parameters())
    for name, value in sorted(values.items()):
        write_parameter(params[name], value)


@dataclass(frozen=True)
class Pretrained:
    """An adapter, whole, on every rank.

    Attributes:
        ranks: by layer.
        values: of all that was trained, by parameter name.
        summary: for ``result.json``: objective, steps, held-out loss before and after, seconds.
    """

    ranks: dict[str, int]
    values: dict[str, torch.Tensor]
    summary: dict[str, Any]

    def give_to(self, model: nn.Module) -> None:
        """Let a model on the same base, with another head, start from it. With ZeRO-3 a collective.

        What the model does not have, or has in another shape, stays behind; what it has alone, a head, as it is.
        """
        set_ranks(model, {name: self.ranks[name] for name in current_ranks(model)})
        params = {name: param for name, param in model.named_parameters() if param.requires_grad}
        fits = {
            name: value
            for name, value in self.values.items()
            if name in params and "modules_to_save" not in name and value.shape == whole_shape(params[name])
        }
        write_values(model, fits)
