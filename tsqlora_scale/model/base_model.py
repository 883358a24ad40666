"""The frozen base: how it is loaded, how its forward computes."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.config.schema import ModelConfig
from tsqlora_scale.engine.own_memory import leave_file
from tsqlora_scale.engine.sharded import whole_shape, write_parameter
from tsqlora_scale.engine.zero_internals import loading_as, shards_while_loading
from tsqlora_scale.model.base_folder import NO_ADAPTER
from tsqlora_scale.model.generation_files import settings_that_load
from tsqlora_scale.model.heads import (
    adopt_head,
    centre_head,
    has_head,
    head_modules,
    output_layer,
    own_labels,
    with_labels_of,
)
from tsqlora_scale.model.stored_quantization import loads_stored, stored_quantization, unpack
from tsqlora_scale.tasks.target_scale import TargetScale

log = logging.getLogger("tsqlora_scale")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def skeleton(auto_class: Any, model_config: Any, *, trust_remote_code: bool = False, **options: Any) -> nn.Module:
    """The model's modules without weights (meta device): names and shapes for checks before anything is loaded.

    Args:
        options: more of ``from_config``.
    """
    with torch.device("meta"):
        bare: nn.Module = auto_class.from_config(model_config, trust_remote_code=trust_remote_code, **options)
    return bare


def can_checkpoint(model: nn.Module) -> bool:
    """Whether a model, bare or with an adapter, can compute its activations again in the backward pass."""
    return any(getattr(part, "supports_gradient_checkpointing", False) for part in model.modules())


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
    peft_task_type: str | None = None,
    train_head: bool = True,
    targets: Callable[[], TargetScale] | None = None,
    says: bool = True,
) -> tuple[nn.Module, list[str]]:
    """Load the frozen base. Layers that the checkpoint lacks (a new head) are drawn from ``generator``, so that every
    engine starts from the same values; a head that it has becomes the task's (:func:`~.heads.adopt_head`).

    Args:
        unquantised: modules that a 4-bit base keeps in floating point (:func:`.heads_of`); PEFT's modules_to_save
            cannot train packed weights.
        peft_task_type: the task, by which the model has a head or not.
        train_head: ``adapter.train_head``.
        targets: of a regression, where a new head is to start (:func:`~.heads.centre_head`); asked where there is one.
        says: whether to report what becomes of a head.

    Returns:
        The model, and the top-level modules that are saved whole: the head, and what holds newly initialised
        parameters.

    Raises:
        UserError: the weights cannot be loaded, or are not those of the config.
    """
    with_head = has_head(peft_task_type)
    config = model_config
    if with_head:
        own = own_labels(name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code)
        if len(own) != len(model_config.id2label):  # the output layer is exchanged after loading, on every engine
            config = with_labels_of(model_config, own)
    kwargs = _loading_options(model, config, unquantised, device)
    try:
        if auto_class in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
            kwargs |= settings_that_load(name_or_path, model.revision)
        with loading_as(DTYPES[model.dtype]):
            loaded, info = auto_class.from_pretrained(
                name_or_path,
                output_loading_info=True,
                trust_remote_code=model.trust_remote_code,
                weights_only=True,
                **NO_ADAPTER,
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
    if model.quantization == "nf4":
        _settle_packed(loaded)
    new = set(info["missing_keys"])
    _refuse_new_language_head(loaded, sorted(new), auto_class=auto_class, name_or_path=name_or_path)
    if with_head:
        if stored_quantization(model_config) is not None:
            _unpack_head(loaded, model, says=says)
        new = adopt_head(loaded, model_config, own, new, name=model.name_or_path, train_head=train_head, says=says)
    initialise_new(loaded, new, std=getattr(model_config, "initializer_range", 0.02), generator=generator)
    if targets is not None and (head := output_layer(loaded, 1)) is not None and f"{head[0]}.weight" in new:
        centre_head(*head, targets(), says=says)
    if model.gradient_checkpointing:
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if getattr(loaded.config, "use_cache", None):
        loaded.config.use_cache = False
    if getattr(loaded, "generation_config", None) is not None:  # the folder's may name another token than is used
        loaded.generation_config.pad_token_id = model_config.get_text_config().pad_token_id
    trained = {_new_module(loaded, key) for key in new}
    return loaded, sorted(trained.union(head_modules(loaded) if with_head else ()))


def _loading_options(
    model: ModelConfig, config: Any, unquantised: list[str], device: torch.device | None
) -> dict[str, Any]:
    """Arguments of ``from_pretrained``: the base's type, and how it is packed or was."""
    options: dict[str, Any] = {"config": config, "dtype": DTYPES[model.dtype], "revision": model.revision}
    if model.attention != "auto":
        options["attn_implementation"] = model.attention
    if model.quantization == "nf4":
        if stored_quantization(config) is not None:
            options["config"] = loads_stored(config, compute_dtype=DTYPES[model.dtype], unquantised=unquantised)
        else:
            options["quantization_config"] = nf4_config(model, unquantised)
        if device is not None and device.type == "cuda" and not shards_while_loading():
            options["device_map"] = {"": device}
    return options


def _settle_packed(loaded: nn.Module) -> None:
    module: Any
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Left on, an evaluation forward repacks the 4-bit weight and the next training step fails.
            module.support_avx512bf16_for_cpu = False
    if not shards_while_loading():
        leave_file(loaded, loaded.parameters())


def _unpack_head(loaded: nn.Module, model: ModelConfig, *, says: bool) -> None:
    """Let a head whose files are 4-bit, too, train."""
    unpacked = unpack(loaded, head_modules(loaded), dtype=DTYPES[model.dtype])
    if unpacked and says and launched_rank() == 0:
        log.warning(
            "model.name_or_path=%r: its head is 4-bit (%s), and is unpacked to train; PEFT alone does not open the "
            "adapter on it, a merged export does without",
            model.name_or_path,
            ", ".join(unpacked),
        )


def _refuse_new_language_head(model: nn.Module, new: list[str], *, auto_class: Any, name_or_path: str) -> None:
    """A model that writes or fills in text has no head of its own to train from nothing, as a classifier has.

    Raises:
        UserError: the checkpoint is of a class without it.
    """
    params = dict(model.named_parameters())
    missing = [key for key in new if key in params]
    if missing and auto_class in (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM):
        raise UserError(
            f"model.name_or_path={name_or_path!r}: its checkpoint has no {missing[0]} ({len(missing)} of {len(params)} "
            f"weights are missing), so it is not one of a {type(model).__name__}, and a random one is no start; give "
            "the checkpoint of a model that has it, or choose another task.type (or pretrain.objective)"
        )


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
        shape = whole_shape(params[name])
        value = torch.zeros(shape)
        if len(shape) > 1:
            value.normal_(0.0, std, generator=generator)
        elif "norm" in name.lower() and name.endswith("weight"):
            value.fill_(1.0)
        write_parameter(params[name], value)


def use_autocast(model: Any, dtype: str, *, fp16: bool = False) -> None:
    """Run the innermost model's forward under autocast, on whatever path it is called; and that of its encoder, which
    ``generate`` calls by itself.

    LoRA's layers then take their inputs as they are: PEFT would make a float32 copy of each, which the backward pass
    keeps, and autocast would round it to the same bf16 again.

    Args:
        fp16: whether to do so for fp16, too: where Accelerate does not, and layers cast nothing of themselves.
    """
    if dtype != "bf16" and not (fp16 and dtype == "fp16"):
        return
    inner: Any = model.base_model.model
    for part in inner.modules():
        if isinstance(part, LoraLayer) and not part.lora_variant:
            part.cast_input_dtype_enabled = False
    encodes = getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
    for part in (inner, *([inner.get_encoder()] if encodes else [])):
        _forward_under_autocast(part, dtype)


def _forward_under_autocast(module: Any, dtype: str) -> None:
    forward = module.forward

    @functools.wraps(forward)
    def autocast_forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(next(module.parameters()).device.type, dtype=DTYPES[dtype]):
            return forward(*args, **kwargs)

    module.forward = autocast_forward


def nf4_config(model: ModelConfig, unquantised: list[str]) -> Any:
    """How Transformers packs a base into 4 bits as it loads.

    Args:
        unquantised: modules that stay in floating point.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=DTYPES[model.dtype],
        bnb_4bit_quant_storage={"uint8": torch.uint8, **DTYPES}[model.quant_storage],
        llm_int8_skip_modules=unquantised,
    )
