"""An adapter described without its model, and written from that description: what PEFT would have written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file

from tsqlora_scale.model.adapters.weight_start import joined
from tsqlora_scale.model.weight_files import DESCRIPTION, WEIGHTS

#: The file that keeps diagonals that an adapter's factors hold: JSON, by layer. Not the weights' header, whose keys
#: come in another order every time.
DIAGONALS = "diagonals.json"


def describe_adapter(model: PeftModel, values: Mapping[str, torch.Tensor], config: LoraConfig) -> dict[str, Any]:
    """What :func:`write_adapter` needs beside the values, as JSON values.

    Args:
        model: that the adapter is on.
        values: full parameters by name, all that the file is to hold.
        config: PEFT's, with the ranks as they are.

    Returns:
        ``config``, the contents of ``adapter_config.json``, and ``keys``, the name in the file of every parameter.
    """
    found = get_peft_model_state_dict(model, state_dict=dict(values), save_embedding_layers=False)
    names = {id(value): name for name, value in values.items()}
    keys = {names[id(value)]: key for key, value in found.items()}
    assert keys.keys() == values.keys(), f"not in the adapter: {sorted(values.keys() ^ keys.keys())}"
    described = {**config.to_dict(), "inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in described.items()}
    return {"config": json.loads(json.dumps(plain)), "keys": keys}


def write_adapter(folder: Path, description: Mapping[str, Any], values: Mapping[str, torch.Tensor]) -> None:
    """Write a plain PEFT adapter.

    Args:
        description: of :func:`describe_adapter`; under ``diagonals`` it may name parameters (r,) that the columns of
            others, (d_out, r), are multiplied by, which makes a LoRA adapter of triplets. :data:`DIAGONALS` keeps them.
        values: of the parameters that it names.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    diagonals = {name: values[other] for name, other in description.get("diagonals", {}).items()}
    tensors = {
        key: (values[name] * diagonals[name] if name in diagonals else values[name]).contiguous()
        for name, key in description["keys"].items()
    }
    tensors |= {key: joined(values, place).contiguous() for key, place in description.get("joined", {}).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if diagonals:
        kept = {description["keys"][name]: e.tolist() for name, e in sorted(diagonals.items())}
        (folder / DIAGONALS).write_text(json.dumps(kept), encoding="utf-8")
    (folder / DESCRIPTION).write_text(json.dumps(description["config"], indent=2, sort_keys=True), encoding="utf-8")
