"""What the launcher was told (``accelerate launch``'s flags and YAML, the environment) against what the config says."""

from __future__ import annotations

import os

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.config.schema import ModelConfig

#: Engines of Accelerate that are none of ours, by the variable that asks for them.
OTHER_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config (tensor, context or sequence parallelism)",
}


def deepspeed_wanted() -> bool:
    """Whether the launcher asked for DeepSpeed."""
    return _is_on("ACCELERATE_USE_DEEPSPEED")


def check_launcher(model: ModelConfig) -> None:
    """Refuse what the launcher asks for and a run does not do: other engines, compilation, another precision.

    Raises:
        UserError: naming the setting, its value and the remedy.
    """
    for variable, engine in OTHER_ENGINES.items():
        if _is_on(variable):
            raise UserError(
                f"the launcher asks for {engine} ({variable}={os.environ[variable]}), which is not supported; "
                "use one process, DDP, or DeepSpeed ZeRO-1, 2 or 3 (configs/accelerate/)"
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


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"  # what Accelerate goes by
