"""DeepSpeed's own settings, a JSON file or the launcher's flags: what contradicts the run is refused before it starts.

``auto`` is filled in from the run's config. A setting that says the same as the config is taken, one that DeepSpeed
would follow against it, or ignore, is not: both end in a run that is silently another one.
"""

from __future__ import annotations

import base64
import difflib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.config.schema import Config
from tsqlora_scale.engine.launcher_settings import deepspeed_wanted

#: Keys at the root that change nothing of what a run computes, or that are checked below.
TAKEN = (
    "aio", "checkpoint", "comet", "comms_config", "comms_logger", "csv_monitor", "dataloader_drop_last",
    "disable_allgather", "disable_python_gc", "dump_state", "flops_profiler", "fp32_allreduce",
    "gradient_accumulation_steps", "gradient_clipping", "log_level", "memory_breakdown", "monitor_config",
    "steps_per_print", "tensorboard", "timers", "train_batch_size", "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism", "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
_PRECISION = "model.dtype decides the precision of the base, and the factors train in float32"
_DATA = "which samples are drawn, and how long they are, is the config's (sampling, task.max_length)"
_NO_PART = "it would change what is trained, and is no part of a run"
#: Sections that a run refuses when they are on, and why.
REFUSED = {
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "fp16": _PRECISION,
    "torch_autocast": _PRECISION,
    "amp": _PRECISION,
    "communication_data_type": _PRECISION,
    "seq_parallel_communication_data_type": _PRECISION,
    "data_types": _PRECISION,
    "optimizer": "the run makes its own AdamW (train.lr, train.betas, train.eps, train.weight_decay)",
    "scheduler": "the run sets the learning rate itself (train.lr_schedule, train.lr_warmup)",
    "activation_checkpointing": "it has no effect on these models; set model.gradient_checkpointing=true in its place",
    "curriculum_learning": _DATA,
    "data_efficiency": _DATA,
    "compression_training": _NO_PART,
    "quantize_training": _NO_PART,
    "eigenvalue": _NO_PART,
    "progressive_layer_drop": _NO_PART,
    "sparse_attention": _NO_PART,
    "sparse_gradients": _NO_PART,
    "prescale_gradients": _NO_PART,
    "gradient_predivide_factor": _NO_PART,
    "gradient_allreduce_op": _NO_PART,
    "managed_gradient_accumulation": _NO_PART,
    "elasticity": _NO_PART,
    "autotuning": _NO_PART,
    "hybrid_engine": _NO_PART,
    "tensor_parallel": _NO_PART,
    "sequence_parallel_size": _NO_PART,
    "pipeline": _NO_PART,
    "compile": _NO_PART,
    "msamp": _PRECISION,
    "graph_harvesting": _NO_PART,
}
#: The same below ``zero_optimization``.
REFUSED_OF_ZERO = {
    **dict.fromkeys(
        ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
        "it rounds what is exchanged between ranks (model.quantization=nf4 makes the base small)",
    ),
    "zero_hpz_partition_size": _NO_PART,
    "mics_shard_size": _NO_PART,
    "mics_hierarchical_params_gather": _NO_PART,
    "zenflow": _NO_PART,
    "cpu_offload": 'it is of old; write "offload_optimizer": {"device": "cpu"} in its place',
    "cpu_offload_param": 'it is of old; write "offload_param": {"device": "cpu"} in its place',
    "cpu_offload_params": 'it is of old; write "offload_param": {"device": "cpu"} in its place',
}
#: Values, beside false, null and auto, that leave a refused setting as it is without it.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "communication_data_type": ("fp32",),
    "seq_parallel_communication_data_type": ("fp32",),
    "data_types.grad_accum_dtype": ("fp32",),
    "gradient_predivide_factor": (1,),
    "gradient_allreduce_op": ("mean",),
    "sequence_parallel_size": (1,),
    "tensor_parallel.autotp_size": (1,),
    "tensor_parallel.tp_size": (1,),
    "tensor_parallel.tp.tp_size": (1,),
    "zero_optimization.zero_hpz_partition_size": (1,),
    "zero_optimization.mics_shard_size": (-1,),
}
OFF = (None, False, "auto", 0, "false", "none", "")


def without_own_collectives() -> None:
    """Keep DeepSpeed from compiling collectives of its own for CPUs, which its inference alone uses.

    It would take a minute of every core, each time that the place of the environment or its tools have changed; and a
    rank that is killed meanwhile leaves a lock, for which all later ones would wait without end.
    """
    import deepspeed.ops

    vars(deepspeed.ops).setdefault("__compatible_ops__", {})  # else it finds out, by trials of the compiler


def check_deepspeed(config: Config) -> None:
    """Refuse settings that contradict the run, but for its sizes (:func:`check_deepspeed_sizes`).

    Raises:
        UserError: naming the file or the flags, the key, its value and the remedy.
    """
    if not deepspeed_wanted():
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "the launcher asks for DeepSpeed, which is not installed; pip install 'tsqlora-scale[deepspeed]'"
        )
    where, settings = _settings()
    for key, value in settings.items():
        if key.startswith("_") or key in TAKEN:  # such names are comments
            continue
        if key not in REFUSED:
            near = difflib.get_close_matches(key, [*TAKEN, *REFUSED], 1, 0.75)
            hint = f"did you mean {near[0]!r}?" if near else "DeepSpeed would ignore it; remove it"
            raise UserError(f"{where}: unknown key {shown(key)}; {hint}")
        _refuse_if_on(where, key, value, REFUSED[key])
    _check_zero(where, settings)
    clipping, wanted = settings.get("gradient_clipping", "auto"), config.train.max_grad_norm or 0.0
    if not _says(clipping, wanted):
        raise UserError(
            f"{where}: gradient_clipping={_json(clipping)} contradicts train.max_grad_norm="
            f'{_json(config.train.max_grad_norm)}; write "auto", or change one of them'
        )


def check_deepspeed_sizes(config: Config, *, micro_batch_size: int, accumulation: int) -> None:
    """Refuse batch sizes that contradict the run's.

    Raises:
        UserError: naming the file, the key, its value and the remedy.
    """
    if not deepspeed_wanted():
        return
    where, settings = _settings()
    wanted = {
        "train_batch_size": (config.train.batch_size, "train.batch_size"),
        "train_micro_batch_size_per_gpu": (micro_batch_size, "train.micro_batch_size, which here comes to"),
        "gradient_accumulation_steps": (accumulation, "train.batch_size / (micro_batch_size x ranks) ="),
    }
    for key, (size, of_config) in wanted.items():
        value = settings.get(key, "auto")
        if not _says(value, size):
            named = f"{of_config}={size}" if of_config == "train.batch_size" else f"{of_config} {size}"
            raise UserError(f'{where}: {key}={_json(value)} contradicts {named}; write "auto", or change one of them')


def without_what_is_off(settings: dict[str, Any]) -> None:
    """Drop refused sections, which are off or ``auto`` if the checks have passed: only some ``auto`` are filled in."""
    for key in REFUSED.keys() - {"bf16", "fp16"}:
        settings.pop(key, None)
    for key in REFUSED_OF_ZERO:
        settings.get("zero_optimization", {}).pop(key, None)


def _settings() -> tuple[str, dict[str, Any]]:
    """Where they come from, and they themselves. Flags that a file makes void are not looked at."""
    given = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if given in ("none", ""):
        return "the launcher's DeepSpeed flags", _of_flags()
    where = f"DeepSpeed's config file {shown(given)}"
    try:
        text = Path(given).read_text(encoding="utf-8") if os.path.lexists(given) else _inline(given)
        settings = json.loads(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{where}: cannot be read as JSON ({reason}); give a JSON file") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise UserError(
            f'{where}: has no section zero_optimization; write at least {{"zero_optimization": {{"stage": 2}}}}'
        )
    return where, settings


def _inline(given: str) -> str:
    """JSON in the place of a file's name, plain or in base64, as Accelerate takes it."""
    if given.lstrip().startswith("{"):
        return given
    try:
        return base64.urlsafe_b64decode(given).decode()
    except ValueError:
        raise FileNotFoundError(2, "No such file or directory") from None


def _of_flags() -> dict[str, Any]:
    def flag(name: str, otherwise: str) -> Any:
        value = os.environ.get(f"ACCELERATE_{name}", otherwise).lower()
        try:
            return json.loads(value)
        except ValueError:
            return value

    accumulation = flag("GRADIENT_ACCUMULATION_STEPS", "auto")
    return {
        "zero_optimization": {
            "stage": flag("DEEPSPEED_ZERO_STAGE", "2"),
            "offload_optimizer": {"device": flag("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")},
            "offload_param": {"device": flag("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")},
        },
        "gradient_clipping": flag("GRADIENT_CLIPPING", "auto"),
        # 1 is what launchers write where nobody has said anything
        "gradient_accumulation_steps": "auto" if accumulation == 1 else accumulation,
    }


def _check_zero(where: str, settings: dict[str, Any]) -> None:
    zero = settings["zero_optimization"]
    stage = zero.get("stage", 0)
    if not (stage == "auto" or (isinstance(stage, int) and not isinstance(stage, bool) and stage in (1, 2, 3))):
        raise UserError(f"{where}: zero_optimization.stage={_json(stage)} is not supported; use 1, 2 or 3")
    for key, value in zero.items():
        if key in REFUSED_OF_ZERO:
            _refuse_if_on(where, f"zero_optimization.{key}", value, REFUSED_OF_ZERO[key])
    offload = zero.get("offload_param") or {}
    device = offload.get("device", "none") if isinstance(offload, dict) else offload
    if device not in OFF and stage != 3:
        raise UserError(
            f"{where}: zero_optimization.offload_param.device={_json(device)} needs ZeRO-3, and stage is "
            f"{_json(stage)}; set zero_optimization.stage to 3, or the device to none"
        )
    _check_types(where, zero)


def _check_types(where: str, zero: dict[str, Any]) -> None:
    """What DeepSpeed itself says of the section; it would say so after the model is loaded."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**_without_auto({key: zero[key] for key in zero if key not in REFUSED_OF_ZERO}))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise UserError(f"{where}: {key}={shown(first['input'])}: {first['msg']}; correct or remove it") from None


def _without_auto(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value != "auto"
    }


def _refuse_if_on(where: str, key: str, value: Any, reason: str) -> None:
    for path, found in _switched_on(key, value):
        raise UserError(f"{where}: {path}={_json(found)} is refused: {reason}; remove {key!r}")


def _switched_on(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Settings in a section that are on: its ``enabled`` alone, where it has one."""
    if not isinstance(value, dict):
        if value not in (*OFF, *DEFAULTS.get(key, ())):
            yield key, value
        return
    for switch in ("enabled", "shared_parameters"):  # the latter has that of a kind of compression
        value = {switch: value[switch]} if switch in value else value
    for name, entry in value.items():
        yield from _switched_on(f"{key}.{name}", entry)


def _says(value: Any, wanted: float) -> bool:
    """Whether a number of the settings is ``wanted``, or left to the run."""
    if value is None or value == "auto":
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and value == wanted


def _json(value: Any) -> str:
    return shown(value) if isinstance(value, str) else json.dumps(value)[:100]
