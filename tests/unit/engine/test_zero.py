"""What the DeepSpeed config says of one model must not be kept for the next."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from tsqlora_scale.engine import zero_internals as zero
from tsqlora_scale.engine.deepspeed_settings import without_own_collectives


def test_automatic_sizes_are_taken_anew_for_every_model() -> None:
    sizes = {
        "stage": 2,
        "reduce_bucket_size": "auto",
        "allgather_bucket_size": 7,
        "stage3_prefetch_bucket_size": "auto",
    }
    plugin = SimpleNamespace(zero_stage=2, deepspeed_config={"zero_optimization": sizes})
    accelerator = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=plugin), gradient_accumulation_steps=2, num_processes=3
    )
    zero.configure(accelerator, micro_batch_size=4, max_grad_norm=None, trainable_numel=1_000_000)
    assert sizes["reduce_bucket_size"] == 2_000_000
    sizes["stage3_prefetch_bucket_size"] = 12  # as Accelerate fills it in, by the first model's width
    zero.configure(accelerator, micro_batch_size=4, max_grad_norm=1.0, trainable_numel=5_000_000)
    assert sizes["reduce_bucket_size"] == 10_000_000
    assert sizes["allgather_bucket_size"] == 7, "what the user has set"
    assert sizes["stage3_prefetch_bucket_size"] == "auto"
    assert plugin.deepspeed_config["train_batch_size"] == 24
    assert zero.bucket_size(160_000_000) == 100_000_000, "400 MB are enough at any rank"


def test_nothing_is_compiled_that_nothing_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.ops

    backend = importlib.import_module("deepspeed.comm.torch")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    without_own_collectives()
    assert backend.build_shm_op() is None
    assert not (tmp_path / "built").exists()
