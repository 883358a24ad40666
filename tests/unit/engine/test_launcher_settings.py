"""Launchers' settings that say what the config says, or leave it to the run, are taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import run_tree
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.engine.deepspeed_settings import check_deepspeed, check_deepspeed_sizes, without_what_is_off
from tsqlora_scale.engine.launcher_settings import check_launcher

#: As in the documentation of Transformers, but for the optimizer and the scheduler.
COMMON = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "amp": {"enabled": "auto", "opt_level": "auto"},
    "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
    },
    "activation_checkpointing": {
        "partition_activations": False,
        "cpu_checkpointing": False,
        "number_checkpoints": None,
    },
    "compression_training": {
        "weight_quantization": {"shared_parameters": {"enabled": False}, "different_groups": {"a": {"bits": 8}}}
    },
    "communication_data_type": "fp32",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
    "_comment": "ours",
}
SAME = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 6}


@pytest.mark.parametrize(
    "settings",
    [
        COMMON,
        COMMON | SAME | {"gradient_clipping": 1},
        {"zero_optimization": {"stage": "auto"}},
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}, "bf16": {"enabled": False}},
    ],
)
def test_what_agrees_is_taken(
    settings: dict[str, Any], tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(run_tree("bert", tmp_path, models_dir, "run"))
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for given in (str(tmp_path / "ds.json"), json.dumps(settings)):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", given)
        check_deepspeed(config)
        check_deepspeed_sizes(config, micro_batch_size=2, accumulation=6)


def test_a_file_without_deepspeed_is_not_read(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(run_tree("bert", tmp_path, models_dir, "run"))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "nowhere.json")
    check_deepspeed(config)


def test_flags_of_accelerate_launch_are_taken(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", model={"dtype": "bf16"}, train={"max_grad_norm": None})
    tree["model"]["name_or_path"] = "x"
    config = parse_config(tree)
    flags = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",  # its default
        "ACCELERATE_GRADIENT_CLIPPING": "0",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_USE_FSDP": "false",
    }
    for name, value in flags.items():
        monkeypatch.setenv(name, value)
    check_launcher(config.model)
    check_deepspeed(config)
    check_deepspeed_sizes(config, micro_batch_size=2, accumulation=6)


def test_what_is_off_is_dropped() -> None:
    """DeepSpeed reads ``auto`` as a yes."""
    settings = json.loads(json.dumps(COMMON))
    without_what_is_off(settings)
    assert not {"amp", "torch_autocast", "activation_checkpointing"} & settings.keys()
    assert settings["zero_optimization"].keys() < COMMON["zero_optimization"].keys()  # type: ignore[attr-defined]
    assert settings["fp16"] == COMMON["fp16"]
