"""What the launcher was told (``accelerate launch``'s flags and YAML, the environment) against what the config says."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.config.model_section import ADAPTER_TRAITS
from tsqlora_scale.config.schema import ModelConfig

#: Engines of Accelerate that are none of ours, by the variable that asks for them.
OTHER_ENGINES = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config (tensor, context or sequence parallelism)",
}
#: Elements from which on FSDP2 shards a weight, where the launcher does not say: gathering less costs only time.
WHOLE_BELOW = 100_000


@dataclass(frozen=True)
class FsdpSettings:
    """What the launcher says of FSDP2.

    Attributes:
        reshard_after_forward: whether a layer's weight is let go between its forward and its backward pass.
        whole_below: weights of fewer elements stay whole on every rank.
    """

    reshard_after_forward: bool = True
    whole_below: int = WHOLE_BELOW

    @classmethod
    def of_launcher(cls) -> FsdpSettings:
        """From the environment. The number of parameters counts where it decides for Accelerate, too; its default,
        a hundred million, is for blocks, and of no other policy."""
        by_size = os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP"
        return cls(
            reshard_after_forward=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false",
            whole_below=int(os.environ.get("FSDP_MIN_NUM_PARAMS", WHOLE_BELOW)) if by_size else WHOLE_BELOW,
        )


def deepspeed_wanted() -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return _is_on("ACCELERATE_USE_DEEPSPEED")


def fsdp_wanted() -> bool:
    """Whether the launcher asked for FSDP; :func:`check_launcher` sees to it that it is FSDP2."""
    return _is_on("ACCELERATE_USE_FSDP")


def check_launcher(model: ModelConfig, *, adapter: str = "lora") -> None:
    """Refuse what the launcher asks for and a run does not do: other engines, compilation, another precision.

    Args:
        adapter: ``adapter.type``.

    Raises:
        UserError: naming the setting, its value and the remedy.
    """
    for variable, engine in OTHER_ENGINES.items():
        if _is_on(variable):
            raise UserError(
                f"the launcher asks for {engine} ({variable}={os.environ[variable]}), which is not supported; "
                "use one process, DDP, DeepSpeed ZeRO-1, 2 or 3, or FSDP2 (configs/accelerate/)"
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no", "none"):
        raise UserError(
            f"the launcher asks for torch.compile (ACCELERATE_DYNAMO_BACKEND={shown(backend)}), which the hooks of "
            "scores and ranks do not pass; launch with --dynamo_backend no"
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("", "no", model.dtype):
        remedy = f"or set model.dtype={precision}" if precision in ("bf16", "fp16") else "(fp8 is not supported)"
        if precision == "fp16" and (deepspeed_wanted() or fsdp_wanted()):
            remedy = "and set model.dtype=bf16 for 16 bits (fp16 goes with one process or DDP alone)"
        raise UserError(
            f"the launcher's mixed_precision={shown(precision)} (ACCELERATE_MIXED_PRECISION) contradicts "
            f"model.dtype={model.dtype!r}, which decides the precision; launch with --mixed_precision no, {remedy}"
        )
    if model.dtype == "fp16" and deepspeed_wanted():
        raise UserError(
            "model.dtype='fp16' does not go with DeepSpeed: it would round the factors' float32 masters at every rank "
            "event, scale no loss under ZeRO-3, and convert packed 4-bit weights as if they were numbers; "
            "set model.dtype=bf16, or launch without DeepSpeed"
        )
    if fsdp_wanted():
        _check_fsdp(model)
        if not ADAPTER_TRAITS[adapter].fsdp:
            reason = "reads the base's weights beside their layers" if adapter == "dora" else "sits beside the layers"
            raise UserError(
                f"adapter.type={adapter!r} {reason}, and FSDP2 gathers weights for their layers only; set "
                "adapter.type=lora or rslora, or use DDP or ZeRO"
            )


def _check_fsdp(model: ModelConfig) -> None:
    """Refuse what FSDP2 is asked for and a run does not do with it.

    Raises:
        UserError: naming the setting and the remedy.
    """
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"the launcher asks for FSDP of version {shown(version)} (FSDP_VERSION), which is not supported; set "
            "fsdp_version: 2 (configs/accelerate/fsdp2.yaml)"
        )
    if _is_on("FSDP_OFFLOAD_PARAMS"):
        raise UserError(
            "fsdp_offload_params=true (FSDP_OFFLOAD_PARAMS) is not supported; set it to false, or keep the base in "
            "CPU memory with ZeRO-3 (configs/accelerate/zero3_offload.yaml)"
        )
    if _is_on("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError(
            "fsdp_activation_checkpointing=true (FSDP_ACTIVATION_CHECKPOINTING) would checkpoint activations twice; "
            "set it to false, and model.gradient_checkpointing=true"
        )
    size = os.environ.get("FSDP_MIN_NUM_PARAMS", "0")
    if not size.isdigit():
        raise UserError(f"fsdp_min_num_params={shown(size)} (FSDP_MIN_NUM_PARAMS) is no number of elements; give one")
    if model.dtype == "fp16":
        raise UserError(
            "model.dtype='fp16' does not go with FSDP2, whose losses no scaler scales; set model.dtype=bf16, or launch "
            "with DDP"
        )
    if model.quantization == "nf4" and model.quant_storage == "uint8":
        raise UserError(
            "model.quant_storage='uint8' does not go with FSDP2, which shards floating-point tensors only; set "
            f"model.quant_storage={model.dtype} (the packed bytes are the same), or use ZeRO or DDP"
        )


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"  # what Accelerate goes by
