"""PEFT: which layers are adapted, how the model is built, and how it leaves as a plain adapter."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import AdapterConfig, ModelConfig
from tsqlora_scale.engine.sharded import read_parameter, write_parameter
from tsqlora_scale.engine.zero import loading_as, shards_while_loading
from tsqlora_scale.model.weight_files import check_adapter

#: PEFT's name of the one adapter that a run trains.
ADAPTER = "default"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers of ``model`` by module name, sorted: the order of every collective and every plan.

    A layer of rank ``r[ADAPTER]`` has ``lora_A[ADAPTER].weight`` of shape (r, d_in), ``lora_B[ADAPTER].weight`` of
    shape (d_out, r), ``scaling[ADAPTER]`` and ``get_base_layer()``. One of rank 0 has neither factor, because ZeRO-1
    and 2 fail on parameters without elements; PEFT's forward passes over what is not in ``lora_A``.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and ADAPTER in m.r}
    return dict(sorted(found.items()))


def has_factors(layer: LoraLayer) -> bool:
    """Whether the layer's rank is not 0."""
    return ADAPTER in layer.lora_A


def short_name(layer: str) -> str:
    """A layer's name without PEFT's wrapping, as ``rank_pattern`` and people write it."""
    return layer.removeprefix("base_model.model.")


def skeleton(auto_class: Any, model_config: Any, *, trust_remote_code: bool = False) -> nn.Module:
    """The model's modules without weights (meta device): names and shapes for checks before anything is loaded."""
    with torch.device("meta"):
        bare: nn.Module = auto_class.from_config(model_config, trust_remote_code=trust_remote_code)
    return bare


def resolve_targets(model: nn.Module, targets: list[str] | str) -> list[str]:
    """Full names of the linear layers to adapt.

    ``auto`` is every linear layer inside the repeated blocks (attention and feed-forward), which for BERT-like
    models is the paper's choice: query, key, value, attention output, intermediate, output. A list holds name
    suffixes; inside the blocks they win over the same names outside (``dense`` is not the pooler's).

    Raises:
        UserError: when a suffix matches no linear layer.
    """
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    blocks = [n for n in linears if re.search(r"\.\d+\.", n)]
    if targets == "auto":
        if not blocks:
            raise UserError(
                "adapter.target_modules='auto' found no linear layer inside repeated blocks of "
                f"{type(model).__name__}; name the layers"
            )
        return blocks
    chosen: list[str] = []
    for target in targets:
        for names in (blocks, linears):
            matches = [n for n in names if n == target or n.endswith(f".{target}")]
            if matches:
                break
        else:
            known = sorted({n.rsplit(".", 1)[-1] for n in linears})
            raise UserError(
                f"adapter.target_modules: {target!r} matches no linear layer of {type(model).__name__}; "
                f"known: {', '.join(known)}"
            )
        chosen += matches
    return sorted(set(chosen))


def heads_of(model: nn.Module) -> list[str]:
    """Linear layers outside the repeated blocks (classifier, pooler, lm_head): never quantised."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not re.search(r"\.\d+\.", n)]


def _is_the_files_fault(error: Exception) -> bool:
    """Whether weights could not be loaded for what is in their files."""
    if isinstance(error, RuntimeError):
        return "mismatch" in str(error)
    # the last is what torch.load says of anything but tensors; its class would have to be imported from pickle
    return isinstance(error, (OSError, ValueError, SafetensorError)) or type(error).__name__ == "UnpicklingError"


def load_base(
    name_or_path: str,
    model: ModelConfig,
    *,
    auto_class: Any,
    model_config: Any,
    unquantised: list[str],
    generator: torch.Generator,
    device: torch.device | None = None,
) -> tuple[nn.Module, list[str]]:
    """Load the frozen base. Layers that the checkpoint lacks (a new head) are drawn from ``generator``, so that every
    engine starts from the same values.

    Args:
        unquantised: modules that a 4-bit base keeps in floating point (:func:`heads_of`); PEFT's modules_to_save
            cannot train packed weights.

    Returns:
        The model, and the top-level modules that hold newly initialised parameters.
    """
    kwargs: dict[str, Any] = {"config": model_config, "dtype": DTYPES[model.dtype], "revision": model.revision}
    if model.quantization == "nf4":
        kwargs["quantization_config"] = _nf4_config(model, unquantised)
        if device is not None and device.type == "cuda" and not shards_while_loading():
            kwargs["device_map"] = {"": device}
    try:
        with loading_as(DTYPES[model.dtype]):
            loaded, info = auto_class.from_pretrained(
                name_or_path,
                output_loading_info=True,
                trust_remote_code=model.trust_remote_code,
                weights_only=True,
                **kwargs,
            )
    except Exception as error:
        if not _is_the_files_fault(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.name_or_path={name_or_path!r}: its weights cannot be loaded ({reason}); "
            "give a complete model whose config.json and model.safetensors belong together"
        ) from None
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Left on, an evaluation forward repacks the 4-bit weight and the next training step fails.
            module.support_avx512bf16_for_cpu = False
    new = sorted(info["missing_keys"])
    initialise_new(loaded, new, std=getattr(model_config, "initializer_range", 0.02), generator=generator)
    if model.gradient_checkpointing:
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if getattr(loaded.config, "use_cache", None):
        loaded.config.use_cache = False
    return loaded, sorted({_new_module(loaded, key) for key in new})


def _new_module(model: nn.Module, key: str) -> str:
    """The module that trains as a whole because the checkpoint lacks its weight ``key``: a head, or a pooler.

    Raises:
        UserError: the weight is not a head's.
    """
    parts = key.split(".")
    inside = parts[0] == getattr(model, "base_model_prefix", None) and len(parts) > 2
    module = ".".join(parts[: 2 if inside else 1])
    if re.search(r"\.\d+\.", key) or "embed" in module:
        raise UserError(
            f"the model's checkpoint has no {key}, which is not a new head; "
            "give model.name_or_path a complete checkpoint of this architecture"
        )
    return module


def initialise_new(model: nn.Module, names: Iterable[str], *, std: float, generator: torch.Generator) -> None:
    """Draw newly initialised parameters in name order: normal weights, zero biases. Works on ZeRO-3's shards."""
    params = dict(model.named_parameters())
    for name in sorted(names):
        if name not in params:
            continue
        shape = getattr(params[name], "ds_shape", params[name].shape)
        value = torch.zeros(shape)
        if len(shape) > 1:
            value.normal_(0.0, std, generator=generator)
        elif "norm" in name.lower() and name.endswith("weight"):
            value.fill_(1.0)
        write_parameter(params[name], value)


def add_adapter(
    base: nn.Module,
    adapter: AdapterConfig,
    *,
    task_type: str,
    new_modules: list[str],
    dtype: str,
    generator: torch.Generator,
) -> PeftModel:
    """Put LoRA layers on ``base``; A is drawn from ``generator`` in name order, B is zero.

    Factors and newly initialised heads train in float32; with a 16-bit base the forward runs under autocast, the
    same on every engine.
    """
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=resolve_targets(base, adapter.target_modules),
        modules_to_save=new_modules or None,
        task_type=task_type,  # type: ignore[arg-type]
        use_rslora=adapter.method == "rslora",
        use_dora=adapter.method == "dora",
    )
    model = get_peft_model(base, config)
    for layer in lora_layers(model).values():
        weight: nn.Parameter = layer.lora_A[ADAPTER].weight  # type: ignore[assignment]
        weight.data.copy_(torch.empty(weight.shape).uniform_(-1, 1, generator=generator) / weight.shape[1] ** 0.5)
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if param.requires_grad:
                module.register_parameter(name, nn.Parameter(read_parameter(param).float()))
    use_autocast(model, dtype)
    return model


def use_autocast(model: PeftModel, dtype: str) -> None:
    """Run the innermost model's forward under autocast, on whatever path it is called."""
    if dtype != "bf16":
        return
    inner: Any = model.base_model.model
    forward = inner.forward

    @functools.wraps(forward)
    def autocast_forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(next(inner.parameters()).device.type, dtype=DTYPES[dtype]):
            return forward(*args, **kwargs)

    inner.forward = autocast_forward


def save_adapter(model: nn.Module, values: Mapping[str, torch.Tensor], folder: Path, *, base_name: str) -> None:
    """Write a plain PEFT adapter: ``PeftModel.from_pretrained`` opens it, nothing of ours needed.

    Args:
        model: the trained PEFT model; its parameters may be sharded.
        values: full trainable parameters by name.
        folder: written by the caller's process alone.
        base_name: what ``adapter_config.json`` names as the base.

    ``rank_pattern`` and ``alpha_pattern`` give every layer its rank and keep its scaling s = alpha / r exactly; layers
    of rank 0 are named in ``exclude_modules``.
    """
    assert isinstance(model, PeftModel)
    of_the_run: Any = model.peft_config[ADAPTER]
    config = copy.copy(of_the_run)
    layers = lora_layers(model)
    ranks = {short_name(n): layer.r[ADAPTER] for n, layer in layers.items()}
    if any(rank != config.r for rank in ranks.values()):
        config.rank_pattern = {name: rank for name, rank in ranks.items() if rank}
        scalings = {short_name(n): layer.scaling[ADAPTER] for n, layer in layers.items()}
        config.alpha_pattern = {name: scalings[name] * rank for name, rank in config.rank_pattern.items()}
        config.exclude_modules = [name for name, rank in ranks.items() if not rank] or None
    config.base_model_name_or_path = base_name
    config.target_modules = sorted(config.target_modules)  # PEFT keeps a set: another order in every process
    state = {name: value.contiguous() for name, value in values.items()}
    empty = [n for n, v in state.items() if v.numel() == 0]
    assert not empty, f"sharded parameters reached the adapter file: {empty}"
    model.peft_config[ADAPTER] = config
    try:
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    finally:
        model.peft_config[ADAPTER] = of_the_run


def load_adapter(base: nn.Module, folder: Path, *, dtype: str) -> PeftModel:
    """Put a saved adapter on a fresh base, for evaluation.

    Raises:
        UserError: when the folder holds no adapter, or one in an unsafe format.
    """
    check_adapter(folder)
    model = PeftModel.from_pretrained(base, str(folder))
    use_autocast(model, dtype)
    return model


def read_adapter(model: nn.Module, folder: Path) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """A saved adapter's ranks by layer and values by parameter name, for a model with a fresh adapter of the config.

    Raises:
        UserError: when the folder holds no adapter, or one of other layers or another scaling.
    """
    check_adapter(folder)
    saved = load_file(folder / "adapter_model.safetensors")
    config: Any = PeftConfig.from_pretrained(str(folder))
    removed = set(config.exclude_modules or [])
    absent = {f"{name}.lora_{side}.{ADAPTER}.weight" for name in lora_layers(model) for side in "AB"
              if short_name(name) in removed}  # fmt: skip
    values = {}
    for name, param in model.named_parameters():
        if param.requires_grad and name not in absent:
            key = name.replace(f".modules_to_save.{ADAPTER}.", ".").replace(f".{ADAPTER}.", ".")
            if key not in saved:
                raise UserError(f"adapter {str(folder)!r} has no {key}; give the config that it was trained with")
            values[name] = saved[key].float()
    ranks = {name: len(values.get(f"{name}.lora_A.{ADAPTER}.weight", ())) for name in lora_layers(model)}
    for name, layer in lora_layers(model).items():
        if not ranks[name]:
            continue
        alpha = config.alpha_pattern.get(short_name(name), config.lora_alpha)
        if abs(alpha / ranks[name] - layer.scaling[ADAPTER]) > 1e-6 * layer.scaling[ADAPTER]:
            raise UserError(
                f"adapter {str(folder)!r} scales {short_name(name)} by {alpha / ranks[name]:g}, adapter.alpha and "
                f"adapter.r of the config say {layer.scaling[ADAPTER]:g}; give the config that it was trained with"
            )
    return ranks, values


def _nf4_config(model: ModelConfig, unquantised: list[str]) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=DTYPES[model.dtype],
        bnb_4bit_quant_storage={"uint8": torch.uint8, **DTYPES}[model.quant_storage],
        llm_int8_skip_modules=unquantised,
    )
