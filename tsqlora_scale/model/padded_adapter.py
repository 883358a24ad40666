"""An adapter with one rank in every layer, filled up with zeros: for readers that know no ``rank_pattern``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.model.adapters.adapter_files import DIAGONALS
from tsqlora_scale.model.model_card import NAME
from tsqlora_scale.model.weight_files import DESCRIPTION, PREFIX, WEIGHTS, layer_ranks, layer_scalings, read_json

#: The values of vLLM's ``max_lora_rank`` (``MaxLoRARanks`` in its config/lora.py; 1 since release 0.11.1).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

#: What vLLM refuses when it loads an adapter, or leaves out without a word: key of the description, and what it is.
_VLLM_REFUSES = {
    "modules_to_save": "a head or another module that was trained whole",
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "biases beside the factors",
    "trainable_token_indices": "single rows of an embedding",
    "target_parameters": "factors of parameters that are no layer's weight",
    "layer_replication": "layers that are used several times",
    "alora_invocation_tokens": "an adapter that is active after some tokens alone",
    "use_qalora": "pooled inputs",
}


def copy_adapter(adapter: Path, out: Path) -> list[str]:
    """The adapter's files as they are."""
    for path in sorted(adapter.iterdir()):
        if path.is_file():
            shutil.copyfile(path, out / path.name)
    return ["the ranks are in rank_pattern and alpha_pattern, which PEFT reads"]


def write_padded(adapter: Path, out: Path) -> list[str]:
    """Zero rows of A and columns of B up to the largest rank; a scaling of its own goes into B. The same function.

    Raises:
        UserError: an embedding is adapted.
    """
    rank = max(layer_ranks(adapter).values())
    _pad_to(rank, adapter, out, form="padded")
    return [f"every adapted layer has rank {rank} now, filled up with zeros"]


def write_for_vllm(adapter: Path, out: Path) -> list[str]:
    """The same at the smallest of :data:`VLLM_RANKS` that holds the largest rank, in plain LoRA's terms.

    Raises:
        UserError: naming what vLLM does not load.
    """
    check_for_vllm(adapter)
    largest = max(layer_ranks(adapter).values())
    rank = next(size for size in VLLM_RANKS if size >= largest)
    _pad_to(rank, adapter, out, form="vllm")
    return [
        f"every adapted layer has rank {rank} now, filled up with zeros: vllm serve BASE --enable-lora "
        f"--max-lora-rank {rank} --lora-modules NAME=FOLDER",
        "which bases it serves with adapters its own documentation lists",
    ]


def check_for_vllm(adapter: Path) -> None:
    """See that vLLM loads an adapter, by its files alone.

    Raises:
        UserError: naming what it refuses, and the way that is left.
    """
    described = read_json(adapter / DESCRIPTION)
    remedy = "export it as merged, which vLLM serves as any model"
    for key, meaning in _VLLM_REFUSES.items():
        if described.get(key):
            raise UserError(f"--format vllm: {key}={shown(described[key])} ({meaning}) is not loaded by vLLM; {remedy}")
    if described.get("bias", "none") != "none":
        raise UserError(f"--format vllm: bias={shown(described['bias'])} is not loaded by vLLM; {remedy}")
    if described.get("task_type") == "SEQ_2_SEQ_LM":
        raise UserError("--format vllm: vLLM serves no adapter of a model with encoder and decoder; choose merged")
    largest = max(layer_ranks(adapter).values())
    if largest > VLLM_RANKS[-1]:
        raise UserError(f"--format vllm: a layer has rank {largest}, vLLM takes {VLLM_RANKS[-1]} at most; {remedy}")


def _pad_to(rank: int, adapter: Path, out: Path, *, form: str) -> None:
    """Write the adapter with ``rank`` in every layer, (rank, d_in) and (d_out, rank), and one scaling."""
    described = read_json(adapter / DESCRIPTION)
    tensors = load_file(adapter / WEIGHTS)
    if embedding := next((name for name in tensors if ".lora_embedding_" in name), None):
        others = "merged or peft" if form == "padded" else "merged"
        raise UserError(f"--format {form}: {embedding} adapts an embedding, which is not padded; choose {others}")
    copy_adapter(adapter, out)
    (out / DIAGONALS).unlink(missing_ok=True)  # of other ranks
    scalings = layer_scalings(adapter)
    common = next(iter(scalings.values()))
    for layer, scaling in scalings.items():
        a, b = (f"{PREFIX}{layer}.lora_{side}.weight" for side in "AB")
        rows, columns = tensors[a], tensors[b]
        missing = rank - len(rows)
        tensors[a] = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])
        tensors[b] = torch.cat([columns * (scaling / common), columns.new_zeros(len(columns), missing)], 1)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    alpha = common * rank  # in plain LoRA's terms, which every reader knows: alpha / r is the scaling
    changed: dict[str, Any] = {"r": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    changed["lora_alpha"] = int(alpha) if alpha == int(alpha) else alpha
    text = json.dumps(described | changed, indent=2, sort_keys=True)
    (out / DESCRIPTION).write_text(text, encoding="utf-8")
    if (out / NAME).is_file():
        with (out / NAME).open("a", encoding="utf-8") as card:
            card.write(f"\nIn this copy every layer has rank {rank}, filled up with zeros: the same function.\n")
