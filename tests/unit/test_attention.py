"""How attention is computed is a key, and bf16 inputs of LoRA's layers stay bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from tests.runs import losses_of, run_tree
from tests.steps import take_step
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.quality.gradients.batch_memory import bytes_kept
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run

OFF: dict[str, Any] = {"allocation": {"policy": "fixed"}, "sampling": {"selector": "full"}}


def tree(kind: str, folder: Path, models: Path, name: str, **model: Any) -> dict[str, Any]:
    found = run_tree(kind, folder, models, name, **OFF)
    return {**found, "model": found["model"] | model}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_kind_of_ones_own(kind: str, tmp_path: Path, models_dir: Path) -> None:
    losses = []
    for attention in ("eager", "sdpa"):
        run = build_run(preflight.check(parse_config(tree(kind, tmp_path, models_dir, attention, attention=attention))))
        module: Any = run.engine.module
        assert module.config._attn_implementation == attention
        for _ in range(3):
            take_step(run)
        losses.append(losses_of(run.record.folder))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(("kind", "attention"), [("llama", "flash_attention_2"), ("deberta", "flash_attention_3")])
def test_one_that_there_is_not(kind: str, attention: str, tmp_path: Path, models_dir: Path) -> None:
    config = parse_config(tree(kind, tmp_path, models_dir, "run", attention=attention))
    with pytest.raises(UserError, match=rf"model\.attention='{attention}'.*choose another, or auto"):
        preflight.check(config)


def test_bf16_inputs_are_not_cast(tmp_path: Path, models_dir: Path) -> None:
    """The losses and gradients are the same to the bit, and less is kept for the backward pass."""
    run = build_run(preflight.check(parse_config(tree("llama", tmp_path, models_dir, "run", dtype="bf16"))))
    module = run.engine.module.train()
    layers = [part for part in module.modules() if isinstance(part, LoraLayer)]
    assert layers and not any(layer.cast_input_dtype_enabled for layer in layers)
    batch = run.task.batch(range(6))
    parameters = [p for p in module.parameters() if p.requires_grad]
    found: list[tuple[Any, int]] = []
    for casts in (False, True):
        for layer in layers:
            layer.cast_input_dtype_enabled = casts
        loss = run.task.losses(module, batch)
        gradients = torch.autograd.grad(loss.sum(), parameters)
        kept = bytes_kept(module, lambda: run.task.losses(module, batch))
        found.append(((loss, *gradients), kept))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] < 0.9 * found[1][1]
