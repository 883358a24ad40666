"""A base's weights read a tensor at a time: where each lies in its files, and what the model calls it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from tsqlora_scale.model.tensor_stream import TORCH_TYPES
from tsqlora_scale.model.weight_files import Shape, read_json


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: in the file.
    """

    name: str
    file: Path
    shape: Shape
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The tensor. The file is closed again, so that what was read of it does not stay in memory."""
        with safe_open(self.file, framework="pt") as opened:
            found: Tensor = opened.get_tensor(self.name)
            return found.clone()


def stored_tensors(path: str, *, revision: str | None) -> dict[str, StoredTensor] | None:
    """The tensors of a model's safetensors files by name; None where it has no such files.

    Args:
        path: a folder or a hub name.
    """

    def find(name: str) -> Path | None:
        found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    single, index = find("model.safetensors"), find("model.safetensors.index.json")
    if single is not None:
        files = [single]
    elif index is not None:
        found = [find(name) for name in sorted(set(read_json(index)["weight_map"].values()))]
        files = [file for file in found if file is not None]
    else:
        return None
    tensors = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                if part.get_dtype() not in TORCH_TYPES:
                    return None
                shape = tuple(part.get_shape())
                tensors[name] = StoredTensor(name, file, shape, TORCH_TYPES[part.get_dtype()])
    return tensors


@dataclass(frozen=True)
class NameInModel:
    """What a tensor of the files becomes.

    Attributes:
        model: the parameter's name in the model.
        file: the name under which it is written again.
        is_whole: whether it is that parameter, not a part of one that is put together (a fused expert's).
    """

    model: str
    file: str
    is_whole: bool


def names_in_model(names: Mapping[str, Any], bare: Any) -> dict[str, NameInModel]:
    """By Transformers' own rules, by which it would load the files.

    Args:
        names: of the tensors in the files.
        bare: the model without weights.

    Returns:
        Nothing of names that the model has no place for.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(bare)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    own = bare.state_dict()
    prefix = bare.base_model_prefix
    found = {}
    for name in names:
        renamed, converter = rename_source_key(name, renamings, converters)
        inner = re.sub(rf"^{re.escape(prefix)}\.", "", renamed)
        placed = next((each for each in (renamed, f"{prefix}.{renamed}", inner) if each in own), None)
        if placed is not None:
            written = placed if renamed == name else name
            found[name] = NameInModel(placed, written, converter is None)
    return found
