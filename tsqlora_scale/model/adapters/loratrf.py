"""LoRATRF (2412.09827): LoRA, and a task-aware filter of what every block gives."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import AdapterConfig
from tsqlora_scale.engine.sharded import whole_shape
from tsqlora_scale.model.adapters.lora import LoraAdapter, lora_config_of
from tsqlora_scale.model.adapters.placement import Placement
from tsqlora_scale.model.adapters.task_filter import SLOT, TaskFilter, place_filters
from tsqlora_scale.model.base_model import use_autocast
from tsqlora_scale.model.block_depths import block_of, chosen_blocks
from tsqlora_scale.model.blocks import block_names, hidden_size
from tsqlora_scale.model.linear_layers import linear_layers
from tsqlora_scale.model.weight_files import (
    ADVICE,
    DESCRIPTION,
    PREFIX,
    WEIGHTS,
    check_adapter,
    read_json,
    tensor_shapes,
)


def in_filter(name: str) -> bool:
    """Whether a parameter is a filter's."""
    return f".{SLOT}." in name


def filtered_blocks(base: nn.Module, unreached: Collection[str], layers: list[int] | str | None) -> list[str]:
    """The blocks of ``adapter.layers`` that texts pass through: not those of a tower for pictures, or that attend to
    pictures alone."""
    found = (block_of(name) for name in linear_layers(base) if name not in unreached)
    reached = list(dict.fromkeys(block for block in found if block is not None))
    if layers is None:
        return reached
    wanted = chosen_blocks(base, layers)
    return [block for block in reached if block in wanted]


def blocks_of(folder: Path, bare: nn.Module) -> list[str]:
    """The blocks that a saved adapter's filters stand behind, as far as the model has them. An older adapter does not
    say which: all of every stack of blocks that has one."""
    names, own = block_names(bare), read_json(folder / DESCRIPTION).get("filtered_blocks")
    if own is not None:
        return [name for name in names if name in own]
    filters = [name.removeprefix(PREFIX) for name in tensor_shapes(folder / WEIGHTS) if in_filter(name)]
    stacks = {name.partition(f".{SLOT}.")[0].rpartition(".")[0] for name in filters}
    return [name for name in names if name.rpartition(".")[0] in stacks] or names


def check_filters(folder: Path, bare: nn.Module) -> None:
    """Whether a saved adapter has a filter for every block of a model, and no other.

    Raises:
        UserError: naming the tensor.
    """
    rank, size = read_json(folder / DESCRIPTION)["filter_rank"], hidden_size(bare)
    shapes = {"task": (size,), "down.weight": (rank, size), "up.weight": (size, rank)}
    blocks = blocks_of(folder, bare)
    wanted = {f"{PREFIX}{block}.{SLOT}.{part}": shape for block in blocks for part, shape in shapes.items()}
    found = {name: shape for name, shape in tensor_shapes(folder / WEIGHTS).items() if in_filter(name)}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"adapter {str(folder)!r}: {name.removeprefix(PREFIX)} is {found.get(name, 'missing')}, for this model "
                f"it is {wanted.get(name, 'none')}; {ADVICE}"
            )


def check_filter_rank(folder: Path, adapter: AdapterConfig) -> None:
    """Raises:
    UserError: a saved adapter's filters have another rank than the config's.
    """
    rank, wanted = read_json(folder / DESCRIPTION)["filter_rank"], adapter.filter_rank or adapter.r
    if rank != wanted:
        raise UserError(
            f"adapter {str(folder)!r}: its filters have rank {rank}, adapter.filter_rank (adapter.r where it is not "
            f"set) is {wanted}; set adapter.filter_rank={rank}"
        )


class LoraTrfAdapter(LoraAdapter):
    """``adapter.type: loratrf``. Its file is one of PEFT's with the filters in it, and says that it is none of PEFT's:
    the LoRA part alone is another model.
    """

    name = "loratrf"
    peft_writes = False

    def build(self, base: nn.Module, placement: Placement) -> PeftModel:
        """See :class:`~.lora.LoraAdapter`; then a filter behind every block."""
        blocks = filtered_blocks(base, placement.unreached, placement.adapter.layers)
        size = hidden_size(base)
        model = super().build(base, placement)
        rank = placement.adapter.filter_rank or placement.adapter.r
        place_filters(model.get_base_model(), blocks, size, rank, placement.generator)
        return model

    def heads(self, model: nn.Module) -> set[str]:
        """See :class:`~.adapter_type.AdapterType`."""
        return {name for name in super().heads(model) if not in_filter(name)}

    def describe(
        self, model: nn.Module, values: Mapping[str, torch.Tensor], *, base_name: str, revision: str | None = None
    ) -> dict[str, Any]:
        """See :class:`~.adapter_type.AdapterType`."""
        assert isinstance(model, PeftModel)
        factors = {name: value for name, value in values.items() if not in_filter(name)}
        found = super().describe(model, factors, base_name=base_name, revision=revision)
        filters = [part for part in model.modules() if isinstance(part, TaskFilter)]
        blocks = {n.removeprefix(PREFIX).partition(f".{SLOT}.")[0] for n in values if in_filter(n)}
        own = {"peft_type": self.name.upper(), "filter_rank": int(whole_shape(filters[0].down.weight)[0])}
        own["filtered_blocks"] = sorted(blocks)
        keys = found["keys"] | {name: name for name in sorted(values) if in_filter(name)}
        return {**found, "config": json.loads(json.dumps(found["config"] | own)), "keys": keys}

    def load(self, base: nn.Module, folder: Path, *, dtype: str) -> PeftModel:
        """See :class:`~.adapter_type.AdapterType`."""
        rank = check_adapter(folder)["filter_rank"]
        place_filters(base, blocks_of(folder, base), hidden_size(base), rank, torch.Generator())
        model = PeftModel.from_pretrained(base, str(folder), config=lora_config_of(folder))
        use_autocast(model, dtype)
        return model
