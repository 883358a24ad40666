"""What a launcher asks for against what the config says."""

from __future__ import annotations

import json
from typing import Any

from tests.bad_input.place import Case, Place

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
FILE = DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}


def deepspeed(name: str, *words: str, stage: Any = 2, zero: dict[str, Any] | None = None, **settings: Any) -> Case:
    """A JSON file of DeepSpeed."""

    def make(place: Place) -> None:
        tree = {"zero_optimization": {"stage": stage} | (zero or {}), "train_batch_size": "auto"} | settings
        (place.folder / "ds.json").write_text(json.dumps(tree))

    return Case(f"DeepSpeed: {name}", ("DeepSpeed's config file", "ds.json'", *words), make, "train", FILE)


def launcher(name: str, environment: dict[str, str], *words: str, **model: Any) -> Case:
    """Variables that a launcher sets."""
    return Case(name, words, lambda place: place.set(model=model), "train", environment)


def text(name: str, content: str, *words: str) -> Case:
    """A DeepSpeed file of these contents."""
    return Case(
        f"DeepSpeed: {name}", words, lambda place: (place.folder / "ds.json").write_text(content), "train", FILE
    )


ON = {"enabled": True}
CASES = [
    deepspeed("bf16", "bf16.enabled=true", "model.dtype", "remove 'bf16'", bf16=ON),
    deepspeed("fp16", "fp16.enabled=true", "model.dtype", fp16=ON | {"loss_scale": 0}),
    deepspeed("autocast", "torch_autocast.enabled=true", "model.dtype", torch_autocast=ON | {"dtype": "bfloat16"}),
    deepspeed("amp", "amp.enabled=true", "model.dtype", amp=ON | {"opt_level": "O1"}),
    deepspeed("types", "data_types.grad_accum_dtype='bf16'", data_types={"grad_accum_dtype": "bf16"}),
    deepspeed("exchange in fp16", "communication_data_type='fp16'", communication_data_type="fp16"),
    deepspeed(
        "an optimizer", "optimizer.type='AdamW'", "train.lr", "remove 'optimizer'",
        optimizer={"type": "AdamW", "params": {"lr": "auto"}},
    ),
    deepspeed(
        "a scheduler", "scheduler.type='WarmupLR'", "train.lr_schedule", scheduler={"type": "WarmupLR", "params": {}}
    ),
    deepspeed("clipping", "gradient_clipping=0.5", "train.max_grad_norm=1.0", '"auto"', gradient_clipping=0.5),
    deepspeed("the global batch", "train_batch_size=64", "train.batch_size=12", '"auto"', train_batch_size=64),
    deepspeed(
        "the micro batch", "train_micro_batch_size_per_gpu=8", "train.micro_batch_size", "comes to 6",
        train_micro_batch_size_per_gpu=8,
    ),
    deepspeed("accumulation", "gradient_accumulation_steps=4", "ranks) = 2", gradient_accumulation_steps=4),
    deepspeed("a batch that is a text", "train_batch_size='12'", "train.batch_size=12", train_batch_size="12"),
    deepspeed(
        "checkpointing", "activation_checkpointing.partition_activations=true", "model.gradient_checkpointing",
        activation_checkpointing={"partition_activations": True, "number_checkpoints": None},
    ),
    deepspeed(
        "compression", "compression_training.weight_quantization.shared_parameters.enabled=true",
        compression_training={"weight_quantization": {"shared_parameters": ON}},
    ),
    deepspeed("a curriculum", "curriculum_learning.enabled=true", curriculum_learning=ON),
    deepspeed("data efficiency", "data_efficiency.enabled=true", "sampling", data_efficiency=ON),
    deepspeed("quantised training", "quantize_training.enabled=true", quantize_training=ON),
    deepspeed("dropped layers", "progressive_layer_drop.enabled=true", progressive_layer_drop=ON | {"theta": 0.5}),
    deepspeed("tensor parallelism", "tensor_parallel.autotp_size=2", tensor_parallel={"autotp_size": 2}),
    deepspeed("a slip of the pen", "'gradient_cliping'", "did you mean 'gradient_clipping'?", gradient_cliping=1.0),
    deepspeed("an unknown key", "'my_setting'", "ignore", my_setting=1),
    deepspeed("quantised weights", "zero_optimization.zero_quantized_weights=true",
              stage=3, zero={"zero_quantized_weights": True}),
    deepspeed("quantised gradients", "zero_optimization.zero_quantized_gradients=true",
              stage=3, zero={"zero_quantized_gradients": True}),
    deepspeed("a second partition", "zero_optimization.zero_hpz_partition_size=2",
              stage=3, zero={"zero_hpz_partition_size": 2}),
    deepspeed("stage 0", "zero_optimization.stage=0", "use 1, 2 or 3", stage=0),
    deepspeed("a stage that is a text", "zero_optimization.stage='3'", stage="3"),
    deepspeed("offload below its stage", "offload_param.device='cpu'", "ZeRO-3",
              zero={"offload_param": {"device": "cpu"}}),
    deepspeed("offload of old", "cpu_offload=true", "offload_optimizer", zero={"cpu_offload": True}),
    deepspeed("a slip of the pen in ZeRO's", "zero_optimization.reduce_bucket_sise", zero={"reduce_bucket_sise": 1}),
    deepspeed("a wrong type", "zero_optimization.overlap_comm", zero={"overlap_comm": "perhaps"}),
    text("no JSON", "{", "'ds.json'", "JSON"),
    text("a list", "[1]", "'ds.json'", "zero_optimization"),
    text("no ZeRO", '{"train_batch_size": "auto"}', "'ds.json'", "zero_optimization"),
    launcher("DeepSpeed: no file", FILE, "'ds.json'", "No such file"),
    launcher("DeepSpeed: stage 0 by flag", DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "flags", "stage=0"),
    launcher(
        "DeepSpeed: clipping by flag", DEEPSPEED | {"ACCELERATE_GRADIENT_CLIPPING": "5.0"}, "gradient_clipping=5.0"
    ),
    launcher(
        "DeepSpeed: accumulation by flag", DEEPSPEED | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        "gradient_accumulation_steps=4",
    ),
    launcher("DeepSpeed with fp16", DEEPSPEED, "model.dtype='fp16'", "masters", "bf16", dtype="fp16"),
    launcher(
        "DeepSpeed with fp16 and nf4", DEEPSPEED, "model.dtype='fp16'", "packed 4-bit weights",
        dtype="fp16", quantization="nf4", quant_storage="fp32",
    ),
    launcher("mixed precision", {"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision='bf16'", "model.dtype='fp32'"),
    launcher("mixed precision of another kind", {"ACCELERATE_MIXED_PRECISION": "fp16"}, "model.dtype='bf16'",
             "--mixed_precision no", dtype="bf16"),
    launcher("mixed precision that DeepSpeed has not", DEEPSPEED | {"ACCELERATE_MIXED_PRECISION": "fp16"},
             "mixed_precision='fp16'", "set model.dtype=bf16"),
    launcher("eight bits", {"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision='fp8'", "not supported"),
    launcher("FSDP of old", {"ACCELERATE_USE_FSDP": "true"}, "version '1'", "fsdp_version: 2"),
    launcher("FSDP2 with offload", FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params=true", "ZeRO-3"),
    launcher("FSDP2 that checkpoints", FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
             "fsdp_activation_checkpointing=true", "model.gradient_checkpointing"),
    launcher("FSDP2 of a size", FSDP | {"FSDP_MIN_NUM_PARAMS": "1e8"}, "fsdp_min_num_params='1e8'"),
    launcher("FSDP2 with fp16", FSDP, "model.dtype='fp16'", "FSDP2", dtype="fp16"),
    Case(
        "FSDP2 with DoRA", ("adapter.type='dora'", "FSDP2"),
        lambda place: place.set(adapter={"method": "dora"}), "train", FSDP,
    ),
    launcher("FSDP2 with packed integers", FSDP, "model.quant_storage='uint8'", "model.quant_storage=fp32",
             quantization="nf4"),
    launcher("Megatron", {"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM", "not supported"),
    launcher("parallelism", {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism config", "not supported"),
    launcher("compilation", {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "'INDUCTOR'", "--dynamo_backend no"),
]  # fmt: skip
