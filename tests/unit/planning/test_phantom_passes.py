"""A plan's bytes against those of the real model: parameters, gradients, moments exactly, passes within 10 %."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory import measured_pass
from tests.runs import TASKS, run_tree
from tests.steps import take_step
from tests.tiny import WORDS
from tests.zoo import saved
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.model.adapters.adapter_type import adapter_type
from tsqlora_scale.planning.forecast import Forecaster
from tsqlora_scale.planning.live_storages import LiveStorages
from tsqlora_scale.quality.features.last_layer import LastLayerLook
from tsqlora_scale.quality.gradients.batch_memory import LiveBytes
from tsqlora_scale.quality.gradients.per_sample import PerSampleGradients
from tsqlora_scale.quality.gradients.sketch import Sketch
from tsqlora_scale.quality.query.looks import FeatureLook
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.preflight import Preflight
from tsqlora_scale.run.training_run import Run

MICRO = 3
Built = tuple[Run, Preflight, Forecaster]


def full_rows(folder: Path) -> None:
    """Texts and targets that are cut to the limits of length, every fourth but shorter: what a plan supposes."""
    rows = []
    for n in range(48):
        words = [WORDS[(n + k) % len(WORDS)] for k in range(60 if n % 4 != 3 else 10)]
        rows.append({"text": " ".join(words), "label": "yes" if n % 2 else "no", "summary": " ".join(words * 3)})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def build(tmp_path: Path, models_dir: Path) -> Callable[..., Built]:
    def built(kind: str, *, model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Built:
        tree = run_tree(kind if kind in TASKS else "llama", tmp_path, models_dir, "run", **sections)
        if kind not in TASKS:
            tree["model"] = {"name_or_path": str(saved(kind, models_dir, "causal"))}
        tree["model"] |= model or {}
        tree["train"]["micro_batch_size"] = MICRO
        full_rows(Path(tree["task"]["dataset"]["path"]))
        checked = preflight.check(parse_config(tree))
        forecaster = Forecaster(checked.config, checked.plan, memory=None, machine="cpu")
        return build_run(checked), checked, forecaster

    return built


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("bert", {"dropout": 0.1}),
        ("deberta", {"gradient_checkpointing": True}),
        ("bart", {"dtype": "bf16"}),
        ("t5", {}),
        ("llama", {"dtype": "bf16", "gradient_checkpointing": True}),
        ("llama", {"dtype": "bf16", "quantization": "nf4"}),
        ("gpt2", {"dropout": 0.1, "dtype": "bf16"}),
        ("mixtral", {"dtype": "bf16"}),
    ],
)
def test_parts_are_those_of_the_real_model(kind: str, model: dict[str, Any], build: Callable[..., Built]) -> None:
    run, _, forecaster = build(kind, model=model)
    checkpointing = bool(model.get("gradient_checkpointing"))
    parts = forecaster.memory_of("plain", MICRO).parts
    module = run.engine.module
    trained = [param for param in module.parameters() if param.requires_grad]
    assert parts["base"] == sum(run.engine.frozen_parameters()["bytes"].values())
    assert parts["factors and head"] == parts["gradients"] == sum(param.nbytes for param in trained)
    scales = [p.quant_state for p in module.parameters() if getattr(p, "quant_state", None) is not None]
    assert bool(scales) == (model.get("quantization") == "nf4")
    assert parts["scales of 4-bit blocks"] == sum(s.absmax.nbytes + s.code.nbytes for s in scales)
    found, needs = measured_pass(run, MICRO), forecaster.step(MICRO, checkpointing)
    assert needs.peak == pytest.approx(found["pass"], rel=0.1)
    if not checkpointing:  # whose own arguments are kept, but not as saved tensors
        assert needs.kept + needs.logits == pytest.approx(found["kept"], rel=0.1)
    take_step(run)
    moments = [entry for state in run.engine._optimizer.optimizer.state.values() for entry in state.values()]  # type: ignore[attr-defined]
    assert parts["moments of Adam"] == sum(entry.nbytes for entry in moments if entry.dim())
    run.engine.close()


@pytest.mark.parametrize(("method", "kind"), [("prompt", "llama"), ("prompt", "t5"), ("prefix", "bert")])
def test_what_stands_before_texts_is_planned(method: str, kind: str, build: Callable[..., Built]) -> None:
    run, _, forecaster = build(kind, adapter={"method": method})
    parts, trained = forecaster.memory_of("plain", MICRO).parts, run.engine.module.parameters()
    assert parts["factors and head"] == sum(param.nbytes for param in trained if param.requires_grad)
    needs = forecaster.step(MICRO, checkpointing=False)
    assert needs.peak == pytest.approx(measured_pass(run, MICRO)["pass"], rel=0.1)
    run.engine.close()


@pytest.mark.parametrize("delta_loss", ["first_order", "exact"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_scoring_batch_takes_what_is_planned(kind: str, delta_loss: str, build: Callable[..., Built]) -> None:
    run, checked, forecaster = build(kind, scoring={"delta_loss": delta_loss, "batch_size": 4})
    module, task = run.engine.module, run.task
    sketch = Sketch(checked.config.scoring.sketch_dim, seed=0)
    theta = adapter_type("lora").theta(module)
    batch = task.batch([1, 2, 3, 4])
    with PerSampleGradients(module, theta) as gradients, LiveBytes([*module.parameters(), *module.buffers()]) as live:
        if delta_loss == "first_order":
            gradients.folded(task.losses, batch, sketch=sketch)
        else:
            _, of_theta = gradients.per_sample(task.losses, batch)
            with gradients.stepped(of_theta, 1.0):
                task.losses(module, batch)
            sketch(of_theta)
    assert forecaster.scoring_of(4, False).peak == pytest.approx(live.peak, rel=0.1)
    run.engine.close()


@pytest.mark.parametrize("selector", ["k_center", "instruction_mining"])
@pytest.mark.parametrize("kind", ["bert", "bart", "llama"])
def test_a_look_by_forwards_takes_what_is_planned(kind: str, selector: str, build: Callable[..., Built]) -> None:
    chosen = {"selector": selector, "keep_fraction": 0.5}
    run, _, forecaster = build(kind, sampling=chosen, scoring={"batch_size": 4})
    module, batch = run.engine.module.eval(), run.task.batch([1, 2, 3, 4])
    look = LastLayerLook(by_position=False) if selector == "k_center" else FeatureLook(run.task, seed=1)
    with LiveBytes([*module.parameters(), *module.buffers()]) as live, torch.no_grad():
        look(module, batch)
    assert forecaster.scoring_of(4, False).peak == pytest.approx(live.peak, rel=0.1)
    run.engine.close()


def test_checkpointing_makes_scoring_smaller(build: Callable[..., Built]) -> None:
    run, _, forecaster = build("llama")
    assert forecaster.scoring_of(4, True).peak < forecaster.scoring_of(4, False).peak
    run.engine.close()


def test_an_evaluation_batch_takes_what_is_planned(build: Callable[..., Built]) -> None:
    run, checked, forecaster = build("bert", train={"eval_batch_size": 6})
    module, task = run.engine.module, run.task
    module.eval()
    with LiveBytes([*module.parameters(), *module.buffers()]) as live, torch.no_grad():
        module(**task.batch([1, 2, 3, 4, 5, 6]).inputs)
    assert forecaster.passes.evaluation().peak == pytest.approx(live.peak, rel=0.1)
    assert checked.config.train.eval_batch_size == 6
    run.engine.close()


def test_a_generation_s_cache_is_planned(build: Callable[..., Built]) -> None:
    """Keys and values of every layer, of all beams, of prompt and answer, beside little else."""
    run, checked, forecaster = build("llama", task={"max_length": 120})
    described: Any = run.engine.module.config
    wide = described.num_key_value_heads * described.hidden_size // described.num_attention_heads
    rows = checked.config.train.eval_batch_size * checked.config.task.num_beams
    cache = 2 * 4 * described.num_hidden_layers * wide * rows * 120
    assert cache < forecaster.passes.evaluation().peak < 12 * cache
    run.engine.close()


def test_a_model_that_asks_for_values_is_one_line(tmp_path: Path, models_dir: Path) -> None:
    """LED counts its global positions."""
    tree = run_tree("bart", tmp_path, models_dir, "run")
    tree["model"]["name_or_path"] = str(saved("led", models_dir, "seq2seq"))
    checked = preflight.check(parse_config(tree))
    forecaster = Forecaster(checked.config, checked.plan, memory=None, machine="cpu")
    with pytest.raises(UserError, match=r"model.name_or_path=.*cannot be tried without its weights .*start a run"):
        forecaster.memory_of("plain", 1)


def test_attention_drops_nothing_out_on_a_gpu(build: Callable[..., Built]) -> None:
    """GPUs' kernels keep no probabilities, with dropout or without; a CPU's do with it."""
    run, checked, on_cpu = build("bert", model={"dropout": 0.1})
    on_gpu = Forecaster(checked.config, checked.plan, memory=None, machine="gpu")
    assert on_gpu.step(MICRO, False).kept < on_cpu.step(MICRO, False).kept
    assert on_gpu.memory_of("plain", MICRO).allowance > 0 == on_cpu.memory_of("plain", MICRO).allowance
    run.engine.close()


def test_storages_are_followed_until_they_are_freed() -> None:
    first = torch.zeros(100)
    with LiveStorages([first]) as live:
        first.add_(1)
        assert live.now == 0
        second = first + 1
        view = second[:10]
        del second
        assert live.now == 400
        del view
        assert live.now == 0
        product = torch.ones(4, 8) @ torch.ones(8, 2)
    assert live.peak == 400
    assert live.flops == 2 * 4 * 8 * 2
    assert product.shape == (4, 2)
