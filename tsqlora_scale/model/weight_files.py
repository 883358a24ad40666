"""Weights and adapters on disk, checked before anything of them is loaded. Adapters are read from safetensors only."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from tsqlora_scale.common.errors import UserError

if TYPE_CHECKING:
    from torch import nn

Shape = tuple[int, ...]

#: What PEFT puts before the names of the base model's modules.
PREFIX = "base_model.model."
DESCRIPTION, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADVICE = "give the config, with the base model, that it was trained with"
#: Weights of other programs.
_OTHER_FORMATS = ("consolidated*", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ckpt", "*.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def tensor_shapes(path: Path) -> dict[str, Shape]:
    """Names and shapes of a safetensors file, from its header; the length of the file is checked against it.

    Raises:
        UserError: the file is missing, cut short, or none.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: no safetensors file, or damaged ({error}); copy it again from where it came"
        ) from None


def check_base_weights(folder: Path, *, key: str) -> None:
    """Check that a model's folder holds whole weights.

    Of ``pytorch_model.bin``, in which older models come (DeBERTa-v3 among them), only the presence is checked: it is
    opened with ``weights_only``, which builds tensors and nothing else.

    Args:
        key: ``key=value`` of the config that names the folder.

    Raises:
        UserError: no weights, or a file that is missing or damaged.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        tensor_shapes(folder / "model.safetensors")
    elif index.is_file():
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
            raise UserError(f"{index}: holds no weight_map; copy the file again from where it came")
        for shard in sorted(set(placed.values())):
            held = tensor_shapes(folder / shard)
            missing = next((name for name, where in placed.items() if where == shard and name not in held), None)
            if missing is not None:
                raise UserError(f"{folder / shard}: {missing} is missing; copy the file again from where it came")
    elif not (folder / "pytorch_model.bin").is_file():
        if not (folder / "pytorch_model.bin.index.json").is_file():
            others = sorted({path.name for kind in _OTHER_FORMATS for path in folder.glob(kind)})[:3]
            instead = f", but {', '.join(others)}, which is not read" if others else ""
            raise UserError(
                f"{key}: its weights cannot be loaded (no model.safetensors in it{instead}); give a complete model"
            )
        placed = read_json(folder / "pytorch_model.bin.index.json").get("weight_map")
        files = sorted(map(str, set(placed.values()))) if isinstance(placed, dict) else []
        lacking = [file for file in files if not (folder / file).is_file()]
        if lacking or not files:
            raise UserError(f"{key}: its weights lack {lacking[0] if lacking else 'a weight_map'}; copy it again")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); copy it again from where it came") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold one JSON object; copy it again from where it came")
    return tree


def check_adapter(folder: Path) -> dict[str, Any]:
    """Check that a folder holds a whole LoRA adapter whose two files agree.

    Returns:
        The description.

    Raises:
        UserError: naming the file or the tensor.
    """
    require_adapter(folder)
    description = read_json(folder / DESCRIPTION)
    kinds: dict[str, Any] = {
        "r": int, "lora_alpha": int | float, "rank_pattern": dict, "alpha_pattern": dict, "target_modules": list | str,
        "modules_to_save": list | None, "exclude_modules": list | str | None,
    }  # fmt: skip
    if description.get("peft_type") not in ("LORA", "LORATRF"):
        raise UserError(f"{folder / DESCRIPTION}: peft_type is {description.get('peft_type')!r}; only LORA is read")
    if description["peft_type"] == "LORATRF":
        kinds["filter_rank"] = int
    for name, kind in kinds.items():
        value = description.get(name, {} if kind is dict else None)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{folder / DESCRIPTION}: {name}={value!r}; give the folder that a run wrote")
    shapes = tensor_shapes(folder / WEIGHTS)
    layers = _layers(shapes)
    if not layers:
        raise UserError(f"{folder / WEIGHTS}: holds no LoRA layers; give the folder that a run wrote")
    for layer in layers:
        a, b = (shapes.get(f"{PREFIX}{layer}.lora_{part}.weight", ()) for part in "AB")
        rank = _of_pattern(description.get("rank_pattern") or {}, layer, description["r"])
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
            raise UserError(
                f"{folder / WEIGHTS}: {layer} has lora_A {a or 'missing'} and lora_B {b or 'missing'}, which do not "
                f"make the rank {rank} of {DESCRIPTION}; give the folder that a run wrote"
            )
    return description


def kind_of(description: Mapping[str, Any]) -> str:
    """The ``adapter.type`` of an adapter's description."""
    kind = str(description.get("peft_type")).lower()
    variants = [name for name in ("dora", "rslora") if description.get(f"use_{name}")]
    return variants[0] if kind == "lora" and variants else kind


def check_own(folder: Path, kind: str) -> dict[str, Any]:
    """Check that a folder holds a whole adapter of a type that is none of PEFT's, whose two files agree.

    Returns:
        The description, and the ``shapes`` of its tensors by name.

    Raises:
        UserError: naming the file or the tensor.
    """
    require_adapter(folder)
    description = read_json(folder / DESCRIPTION)
    if kind_of(description) != kind:
        raise UserError(
            f"adapter {str(folder)!r}: is of adapter.type={kind_of(description)!r}, the config's is {kind!r}; {ADVICE}"
        )
    shapes = tensor_shapes(folder / WEIGHTS)
    kinds = {"r": int | None, "whole_modules": list, "parameters": list}
    for name, wanted in kinds.items():
        if name not in description or not isinstance(description[name], wanted):
            value = description.get(name)
            raise UserError(f"{folder / DESCRIPTION}: {name}={value!r}; give the folder that a run wrote")
    differing = sorted(set(map(str, description["parameters"])) ^ shapes.keys())
    if differing or not shapes:
        what = differing[0] if differing else "every parameter"
        raise UserError(f"{folder / WEIGHTS}: {what} is not in both files; give the folder that a run wrote")
    return {**description, "shapes": shapes}


def check_layers(folder: Path, model: nn.Module) -> None:
    """Check that the layers of a whole adapter are this model's.

    Raises:
        UserError: naming the first that is missing, or of another shape.
    """
    from tsqlora_scale.model.linear_layers import linear_layers, weight_shape

    tensors = tensor_shapes(folder / WEIGHTS)
    own: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    linear = linear_layers(model)
    for layer in _layers(tensors):
        size = own.get(f"{layer}.weight")
        a, b = (tensors[f"{PREFIX}{layer}.lora_{part}.weight"] for part in "AB")
        if size is None:
            raise UserError(f"adapter {str(folder)!r}: the model has no layer {layer}; {ADVICE}")
        fits = (b[0], a[1])
        if layer in linear and fits != weight_shape(linear[layer]):
            raise UserError(f"adapter {str(folder)!r}: {layer} is for a weight {fits}, the model's is {size}; {ADVICE}")


def layer_ranks(folder: Path) -> dict[str, int]:
    """Ranks of a whole adapter's layers by module name, those of rank 0 among them."""
    tensors = tensor_shapes(folder / WEIGHTS)
    removed = read_json(folder / DESCRIPTION).get("exclude_modules") or []
    ranks = {layer: tensors[f"{PREFIX}{layer}.lora_A.weight"][0] for layer in _layers(tensors)}
    return {**ranks, **dict.fromkeys([removed] if isinstance(removed, str) else removed, 0)}


def layer_scalings(folder: Path) -> dict[str, float]:
    """What PEFT multiplies a layer's B A by, of the layers of a whole adapter that have a rank."""
    description = read_json(folder / DESCRIPTION)
    alphas = description.get("alpha_pattern") or {}
    return {
        layer: _of_pattern(alphas, layer, description["lora_alpha"])
        / (math.sqrt(rank) if description.get("use_rslora") else rank)
        for layer, rank in layer_ranks(folder).items()
        if rank
    }


def check_fits(folder: Path, model: nn.Module) -> None:
    """Check that an adapter is whole and one of this model, tensor by tensor.

    Args:
        folder: of the adapter.
        model: the base, on any device.

    Raises:
        UserError: naming the first tensor that is missing, too much, or of another shape.
    """
    from tsqlora_scale.model.linear_layers import linear_layers

    description = check_adapter(folder)
    check_layers(folder, model)
    tensors = tensor_shapes(folder / WEIGHTS)
    own: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    linear = linear_layers(model)
    layers = _layers(tensors)
    advice = ADVICE
    for name, shape in tensors.items():
        inner = name.removeprefix(PREFIX).replace(".base_layer.", ".")  # PEFT copies an adapted head's own weight, too
        if ".lora_" not in inner and ".task_filter." not in inner and own.get(inner) != shape:
            has = f"the model's is {own[inner]}" if inner in own else "the model has none"
            raise UserError(f"adapter {str(folder)!r}: {inner} is {shape}, {has}; {advice}")
    targets = description["target_modules"]
    removed = description.get("exclude_modules") or []  # layers of rank 0
    wanted = {name for name in linear if _targeted(name, targets)} - set(layers)
    wanted = {name for name in wanted if not _targeted(name, removed)}
    if wanted:
        raise UserError(f"adapter {str(folder)!r}: the layer {min(wanted)} is missing in {WEIGHTS}; {advice}")
    for module in description.get("modules_to_save") or []:
        for name in own:
            if re.search(rf"(^|\.){re.escape(module)}\.", name) and f"{PREFIX}{name}" not in tensors:
                raise UserError(f"adapter {str(folder)!r}: {name} is missing in {WEIGHTS}; {advice}")


def require_adapter(folder: Path) -> None:
    """Check that a folder holds the two files of a saved adapter.

    Raises:
        UserError: it holds none, or one in an unsafe format.
    """
    if not (folder / DESCRIPTION).is_file():
        raise UserError(f"adapter {str(folder)!r} holds no {DESCRIPTION}; give the folder that a run wrote")
    if not (folder / WEIGHTS).is_file():
        pickles = _pickles(folder)
        other = f", but {pickles}, a format that can run code when it is opened" if pickles else ""
        raise UserError(
            f"adapter {str(folder)!r} holds no {WEIGHTS}{other}; other formats are not read: save it with PEFT's "
            "save_pretrained"
        )


def _pickles(folder: Path) -> str:
    """Names of pickled weights, some of them."""
    return ", ".join(sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))[:3])


def _layers(names: Iterable[str]) -> list[str]:
    """The modules that have LoRA factors, sorted."""
    found = (re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_[AB]\.weight", name) for name in names)
    return sorted({match[1] for match in found if match})


def _of_pattern(pattern: Mapping[str, Any], layer: str, otherwise: Any) -> Any:
    """A layer's value; see :func:`pattern_of`."""
    key = pattern_of(layer, pattern, where=DESCRIPTION)
    return otherwise if key is None else pattern[key]


def pattern_of(layer: str, patterns: Iterable[str], *, where: str) -> str | None:
    """The pattern that a layer's value is found by, by PEFT's rule: the first that is its name or the end of it, or a
    regular expression for either; None where there is none.

    Args:
        where: the patterns stand, for messages.

    Raises:
        UserError: one is no regular expression.
    """
    return next((pattern for pattern in patterns if _matches(rf"(.*\.)?({pattern})", layer, where=where)), None)


def _targeted(name: str, targets: list[str] | str) -> bool:
    if isinstance(targets, str):
        return targets != "all-linear" and _matches(targets, name)
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _matches(pattern: str, name: str, *, where: str = DESCRIPTION) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is no pattern of layers' names ({error}); mend it") from None
