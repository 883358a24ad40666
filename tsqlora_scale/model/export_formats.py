"""A trained adapter in the forms that others want: as it is, with one rank everywhere, or merged into its base."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.random_streams import generator_for
from tsqlora_scale.config.locations import resolve
from tsqlora_scale.config.model_section import ADAPTER_TRAITS
from tsqlora_scale.config.schema import Config
from tsqlora_scale.model.adapters.adapter_type import own_type, saved_kind
from tsqlora_scale.model.base_model import load_base
from tsqlora_scale.model.describe import check_adapter_fits, check_architecture, check_weights, load_descriptions
from tsqlora_scale.model.linear_layers import transpose_again, transposed_layers
from tsqlora_scale.model.model_card import NAME, result_beside, write_card
from tsqlora_scale.model.stored_quantization import dequantised
from tsqlora_scale.model.tied_weights import is_untied, save_untied, ties_of, untie_adapted
from tsqlora_scale.model.weight_files import DESCRIPTION, WEIGHTS, check_adapter, check_own
from tsqlora_scale.tasks import auto_class_of, objective_class

FORMATS = ("peft", "padded", "merged")


def export(adapter: Path, form: str, out: Path, *, config: Config | None, overwrite: bool = False) -> list[str]:
    """Write ``adapter`` to the folder ``out``, whole or not at all.

    Args:
        adapter: the folder that a run wrote.
        form: one of :data:`FORMATS`.
        config: of the run; needed to merge.

    Returns:
        What is worth saying about it, line by line.

    Raises:
        UserError: no adapter there, no config to merge by, or something at ``out`` already.
    """
    kind = saved_kind(adapter)
    own = own_type(kind)
    if own is None:
        check_adapter(adapter)
    else:
        check_own(adapter, kind)
    if form == "padded" and (own is not None or ADAPTER_TRAITS[kind].unmerged):
        raise UserError(
            f"--format padded: is for ranks of plain LoRA layers, the adapter is of type {kind}; choose peft"
        )
    if form == "merged" and ADAPTER_TRAITS[kind].unmerged:
        raise UserError(f"--format merged: an adapter of type {kind} has no merge: {ADAPTER_TRAITS[kind].unmerged}")
    if out.resolve() == adapter.resolve():
        raise UserError(f"--out {str(out)!r} is the adapter itself; choose another folder")
    if out.exists() and not overwrite:
        raise UserError(f"--out {str(out)!r} exists; choose another folder, or give --overwrite")
    if form == "merged" and config is None:
        raise UserError("--format merged loads the base, and needs --config FILE: the run's config.yaml")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        if form == "merged":
            assert config is not None
            notes = _merge(adapter, partial, config)
            write_card(partial, config, result_beside(adapter), merged=True)
        else:
            notes = _copy(adapter, partial, kind) if form == "peft" else _pad(adapter, partial)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise UserError(f"--out {str(out)!r} cannot be written ({error.strerror}); choose another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return notes


def _copy(adapter: Path, out: Path, kind: str = "lora") -> list[str]:
    for path in sorted(adapter.iterdir()):
        if path.is_file():
            shutil.copyfile(path, out / path.name)
    if ADAPTER_TRAITS[kind].own:
        return [f"tsqlora_scale.load_adapter(base, folder) opens it; PEFT has no adapter of type {kind}"]
    return ["the ranks are in rank_pattern and alpha_pattern, which PEFT reads"]


def _pad(adapter: Path, out: Path) -> list[str]:
    """Zero rows of A and columns of B up to the largest rank; a scaling of its own goes into B. The same function."""
    _copy(adapter, out)
    config: Any = PeftConfig.from_pretrained(str(adapter))
    tensors = load_file(adapter / WEIGHTS)
    if embedding := next((name for name in tensors if ".lora_embedding_" in name), None):
        raise UserError(f"--format padded: {embedding} adapts an embedding, which is not padded; choose merged or peft")
    suffix = ".lora_A.weight"
    layers = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    rank = max(len(tensors[layer + suffix]) for layer in layers)

    def scaling(layer: str) -> float:
        own = len(tensors[layer + suffix])
        name = layer.removeprefix("base_model.model.")
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
        return float(alpha) / (math.sqrt(own) if config.use_rslora else own)

    common = scaling(layers[0])
    padded = dict(tensors)
    for layer in layers:
        a, b = tensors[layer + suffix], tensors[f"{layer}.lora_B.weight"]
        missing = rank - len(a)
        padded[layer + suffix] = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        padded[f"{layer}.lora_B.weight"] = torch.cat([b * (scaling(layer) / common), b.new_zeros(len(b), missing)], 1)
    save_file(padded, out / WEIGHTS, metadata={"format": "pt"})
    described = json.loads((adapter / DESCRIPTION).read_text(encoding="utf-8"))
    described |= {"r": rank, "rank_pattern": {}, "alpha_pattern": {}}
    described["lora_alpha"] = common * (math.sqrt(rank) if config.use_rslora else rank)
    (out / DESCRIPTION).write_text(json.dumps(described, indent=2, sort_keys=True), encoding="utf-8")
    if (out / NAME).is_file():
        with (out / NAME).open("a", encoding="utf-8") as card:
            card.write(f"\nIn this copy every layer has rank {rank}, filled up with zeros: the same function.\n")
    return [f"every adapted layer has rank {rank} now, filled up with zeros"]


def _merge(adapter: Path, out: Path, config: Config) -> list[str]:
    """A plain Transformers model. A 4-bit base is dequantised first, to the values that the adapter was trained on."""
    as_it_was = config.model.model_copy(update={"dropout": None, "gradient_checkpointing": False})
    config = config.model_copy(update={"model": as_it_was})  # these are for training, and would get into the file
    path = resolve(config.model.name_or_path, key="model.name_or_path")
    check_weights(config, path)
    model_config, tokenizer = load_descriptions(config, path)
    unquantised = check_architecture(config, model_config, tokenizer)
    check_adapter_fits(config, model_config, adapter)
    notes = []
    base: Any
    base, _ = load_base(
        path,
        config.model,
        auto_class=auto_class_of(config.task),
        model_config=model_config,
        unquantised=unquantised,
        generator=generator_for(config.run.seed, "head"),
        peft_task_type=objective_class(config.task).peft_task_type,
        train_head=config.adapter.train_head,
        says=False,
    )
    own = own_type(saved_kind(adapter))
    if own is not None:
        whole = own.merged(base, adapter)
        whole.config.use_cache = True
        whole.save_pretrained(str(out))
        tokenizer.save_pretrained(str(out))
        return ["a plain Transformers model: from_pretrained opens it"]
    ties, transposed = ties_of(base), transposed_layers(base)
    if config.model.quantization != "none":
        base = dequantised(base)
        notes.append(f"the base was dequantised to {config.model.dtype}; the file is as large as that, not 4-bit")
    try:
        adapted: Any = PeftModel.from_pretrained(base, str(adapter))
        untie_adapted(adapted)
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--adapter {str(adapter)!r} does not fit model.name_or_path={path!r} ({reason})") from None
    transpose_again(merged, transposed)
    merged.config.use_cache = True
    if is_untied(merged, ties):
        key = f"--adapter {str(adapter)!r}"
        save_untied(merged, ties, out, auto_class=auto_class_of(config.task), key=key)
        notes.append("embeddings and output layer share their weights no longer (tie_word_embeddings: false)")
    else:
        merged.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    return [*notes, "a plain Transformers model: from_pretrained opens it, without PEFT"]
