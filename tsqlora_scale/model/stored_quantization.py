"""Bases whose files are quantised already: bitsandbytes' 4-bit ones are trained on, others refused."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.config.schema import ModelConfig
from tsqlora_scale.model.base_tensors import names_in_model
from tsqlora_scale.model.weight_files import read_json, tensor_shapes

_MARK = ".weight.quant_state.bitsandbytes__"


def stored_quantization(model_config: Any) -> dict[str, Any] | None:
    """What a model's config says of the form of its files; None of floating-point ones."""
    for part in (model_config, model_config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            found = getattr(part, name, None)
            if found:
                return dict(found) if isinstance(found, dict) else {"quant_method": found}
    return None


def check_can_unpack(model: ModelConfig) -> None:
    """Raises:
    UserError: 4-bit weights, and nothing here that computes with them.
    """
    if model.quantization == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.quantization='nf4' needs bitsandbytes; pip install 'tsqlora-scale[nf4]'")


def check_stored(model: ModelConfig, model_config: Any, *, key: str) -> None:
    """See that the run can train on what the files hold.

    Args:
        key: ``key=value`` of the config that names the model.

    Raises:
        UserError: files of another method, or not the keys that bitsandbytes' 4-bit files need.
    """
    stored = stored_quantization(model_config)
    if stored is None:
        if getattr(model_config, "quantization_config", None) is not None:  # empty, which transformers cannot read
            del model_config.quantization_config
        return
    method = stored.get(
        "quant_method", "bitsandbytes" if "load_in_4bit" in stored or "load_in_8bit" in stored else None
    )
    if method != "bitsandbytes" or not stored.get("load_in_4bit"):
        how = "8-bit by bitsandbytes" if method == "bitsandbytes" else f"quantised by {shown(method)}"
        raise UserError(
            f"{key}: its weights are {how}, on which no exact gradients are taken; give the model that is not "
            "quantised (model.quantization=nf4 packs it into 4 bits as it loads), or one in 4-bit by bitsandbytes"
        )
    if model.quantization != "nf4":
        raise UserError(f"{key}: its weights are 4-bit by bitsandbytes; set model.quantization=nf4")
    storage = str(stored.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
    name = {"bfloat16": "bf16", "float32": "fp32"}.get(storage, storage)
    if name != model.quant_storage:
        remedy = f"set model.quant_storage={name}" if name in ("uint8", "bf16", "fp32") else "give another model"
        raise UserError(f"{key}: its 4-bit weights are stored as {storage}, not {model.quant_storage}; {remedy}")


def check_packed(folder: Path, *, key: str) -> None:
    """Find weights that are packed though the config does not say so, as older GPTQ and AWQ files are.

    Raises:
        UserError: naming the tensor.
    """
    packed = next((name for name in sorted(_names_in(folder)) if name.endswith(".qweight")), None)
    if packed is not None:
        raise UserError(
            f"{key}: its weights are quantised ({packed} is packed, as GPTQ and AWQ do); give the model that is not, "
            "and model.quantization=nf4 for 4 bits"
        )


def kept_in_floating_point(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Linear layers that 4-bit files hold in floating point, or not at all.

    Args:
        model: without weights.
        names: of the tensors in the files, which may be the body's own, without its prefix, or older ones.
    """
    weights = {f"{name.split(_MARK)[0]}.weight": None for name in names if _MARK in name}
    packed = {each.model.removesuffix(".weight") for each in names_in_model(weights, model).values()}
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in packed]


def names_in_files(path: str, *, revision: str | None) -> set[str]:
    """Names of the tensors of a model in safetensors files, in a folder or of a hub."""
    if Path(path).is_dir():
        return _names_in(Path(path))
    from transformers.utils.hub import cached_file

    for name in ("model.safetensors", "model.safetensors.index.json"):
        found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            return _names_in(Path(found).parent)
    return set()


def _names_in(folder: Path) -> set[str]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return set(tensor_shapes(folder / "model.safetensors"))
    return set(read_json(index).get("weight_map") or ()) if index.is_file() else set()


def loads_stored(model_config: Any, *, compute_dtype: torch.dtype, unquantised: list[str]) -> Any:
    """A copy of a model's config by which its 4-bit files are read for this run."""
    changed = copy.deepcopy(model_config)
    stored = stored_quantization(model_config)
    assert stored is not None
    changed.quantization_config = stored | {
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "llm_int8_skip_modules": unquantised,
    }
    return changed


def dequantised(model: Any) -> Any:
    """A 4-bit model in floating point, of the values that its weights stand for."""
    plain = model.dequantize()
    reading = getattr(plain, "_weight_conversions", None)
    if reading is not None:  # transformers would undo what it read 4-bit files by, and cannot
        plain._weight_conversions = [
            rule
            for rule in reading
            if not any("Bnb" in type(step).__name__ for step in getattr(rule, "operations", ()))
        ]
    return plain


def unpack(model: nn.Module, modules: Iterable[str], *, dtype: torch.dtype) -> list[str]:
    """Give 4-bit layers inside ``modules`` floating-point weights of the same values: packed ones cannot train.

    Returns:
        Names of the layers.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    tops = set(modules)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    packed = {name: module for name, module in packed.items() if name.split(".")[0] in tops}
    for name, layer in packed.items():
        weight: Any = layer.weight
        value = dequantize_4bit(weight.data, weight.quant_state).to(dtype)
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, value.device, dtype)
        plain.weight.data.copy_(value)
        if layer.bias is not None:
            plain.bias.data.copy_(layer.bias)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, plain)
    return list(packed)
