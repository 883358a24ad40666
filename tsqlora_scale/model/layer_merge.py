"""One layer of an adapter merged into one weight, by PEFT's own arithmetic; and what a 4-bit weight stands for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from tsqlora_scale.model.weight_files import DESCRIPTION, PREFIX, WEIGHTS, layer_scalings, read_json, tensor_shapes


class LayerMerger:
    """The layers of a saved adapter, each read when it is merged."""

    def __init__(self, adapter: Path) -> None:
        """
        Args:
            adapter: a whole LoRA adapter's folder.
        """
        self._file = adapter / WEIGHTS
        self._described = read_json(adapter / DESCRIPTION)
        self._scalings = layer_scalings(adapter)
        self.shapes = {name.removeprefix(PREFIX): shape for name, shape in tensor_shapes(self._file).items()}

    @property
    def layers(self) -> list[str]:
        """Names of the modules that have factors."""
        return list(self._scalings)

    @property
    def replaced(self) -> list[str]:
        """Names of parameters that the adapter holds whole: a head's."""
        return [name for name in self.shapes if ".lora_" not in name]

    def read(self, name: str) -> Tensor:
        """A tensor of the adapter by its name in the model."""
        with safe_open(self._file, framework="pt") as opened:
            found: Tensor = opened.get_tensor(PREFIX + name)
            return found.clone()

    def merged(self, layer: str, module: nn.Module, weight: Tensor) -> Tensor:
        """The layer's new weight, what ``merge_and_unload(safe_merge=True)`` makes of it.

        Args:
            module: the layer in the model, without weights: torch's linear one or GPT-2's.
            weight: its weight, as it lies in such a module.

        Raises:
            ValueError: the result is not finite.
        """
        part = copy.deepcopy(module).to_empty(device="cpu").to(weight.dtype)
        part.weight = nn.Parameter(weight, requires_grad=False)
        holder = nn.Module()
        holder.layer = part
        begin = f"{layer}.lora_"
        tensors = {name: self.read(name) for name in self.shapes if name.startswith(begin)}
        config = LoraConfig(
            r=len(tensors[f"{layer}.lora_A.weight"]),
            target_modules=["layer"],
            use_dora=bool(self._described.get("use_dora")),
            use_rslora=bool(self._described.get("use_rslora")),
            fan_in_fan_out=bool(self._described.get("fan_in_fan_out")),
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # of a setting that PEFT mends itself
            warnings.simplefilter("ignore")
            adapted: Any = get_peft_model(holder, config)  # type: ignore[arg-type]
        own = {f"{PREFIX}layer{name.removeprefix(layer)}": value for name, value in tensors.items()}
        set_peft_model_state_dict(adapted, own)
        adapted.base_model.model.layer.scaling["default"] = self._scalings[layer]
        result: Tensor = adapted.merge_and_unload(safe_merge=True).layer.weight.data
        return result


def through_nf4(weight: Tensor) -> Tensor:
    """What a weight, (d_out, d_in), stands for after it was packed into 4 bits as the base is when it loads."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Params4bit

    packed: Any = Params4bit(weight.contiguous(), requires_grad=False, quant_type="nf4", compress_statistics=False)
    packed = packed.to(weight.device)
    value: Tensor = dequantize_4bit(packed.data, packed.quant_state)
    return value


def unpacked(packed: Tensor, statistics: Mapping[str, Tensor]) -> Tensor:
    """What a weight stands for that lies packed in files of bitsandbytes.

    Args:
        statistics: the tensors beside it, by the ends of their names (``absmax``, ``quant_map``, …).
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Params4bit

    weight: Any = Params4bit.from_prequantized(
        data=packed, quantized_stats=dict(statistics), requires_grad=False, device="cpu"
    )
    value: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return value
