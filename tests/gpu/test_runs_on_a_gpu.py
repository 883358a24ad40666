"""Whole runs on a GPU: every type, rank events, resuming, answers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.mixed_lengths import mixed_tree
from tests.runs import go, losses_of, ranks_of, read_lines, result_of, run_tree, write_config
from tests.steps import Killed, killed_in_step
from tsqlora_scale import api
from tsqlora_scale import training as loop
from tsqlora_scale.run.training_run import Run

ROOT = Path(__file__).resolve().parents[2]
PHASES = {"load", "warmup", "scoring", "training", "resizing", "evaluation"}


def is_on_gpu(run: Run) -> bool:
    """Its model, and the optimizer's moments and counts."""
    state = run.engine._optimizer.optimizer.state  # type: ignore[attr-defined]
    kept = [value for entry in state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    return bool(kept) and all(tensor.is_cuda for tensor in [*run.engine.module.parameters(), *kept])


@pytest.mark.parametrize(
    ("kind", "dtype"), [("bert", "fp32"), ("bert", "bf16"), ("bert", "fp16"), ("llama", "bf16"), ("bart", "fp32")]
)
def test_a_whole_run(tmp_path: Path, models_dir: Path, kind: str, dtype: str) -> None:
    """Warm-up, a pass over the pool, two rank events and an evaluation."""
    run = go(run_tree(kind, tmp_path, models_dir, "run", model={"dtype": dtype}))
    folder = run.record.folder
    losses = losses_of(folder)
    assert len(losses) == 13 and all(map(math.isfinite, losses))
    assert [line["step"] for line in read_lines(folder / "ranks.jsonl")] == [4, 8]
    assert run.engine.world.device.type == "cuda" and is_on_gpu(run)
    assert run.engine._optimizer.optimizer.defaults["fused"] is True  # type: ignore[attr-defined]
    assert run.engine.gather().optimizer_steps <= 13  # fp16's scaler may leave some out
    result = result_of(folder)
    peaks = result["peak_memory_by_phase"]
    assert peaks.keys() >= PHASES and min(peaks.values()) > 0
    assert result["peak_memory_bytes"] == [max(peaks.values())]
    values = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(value.isfinite().all() for value in values.values())


@pytest.mark.parametrize(("attention", "dtype", "near"), [("sdpa", "fp32", 1e-4), ("flash_attention_2", "bf16", 0.05)])
def test_a_run_of_packed_samples(tmp_path: Path, models_dir: Path, attention: str, dtype: str, near: float) -> None:
    """Of texts of mixed lengths, end to end and a row each."""
    if attention == "flash_attention_2" and find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    model = {"dtype": dtype, "attention": attention}
    plain, packed = (
        go(mixed_tree("llama", tmp_path, models_dir, packing=packing, model=model)).record.folder
        for packing in (False, True)
    )
    assert losses_of(packed) == pytest.approx(losses_of(plain), abs=near)


def test_the_same_run_as_on_a_cpu(tmp_path: Path, models_dir: Path) -> None:
    """In fp32, until a decision falls otherwise."""
    tree = run_tree("bert", tmp_path, models_dir, "gpu")
    folder = go(tree).record.folder
    other = write_config(tmp_path / "cpu.yaml", tree | {"run": tree["run"] | {"name": "cpu"}})
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(other)]
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of(folder)[:4] == pytest.approx(losses_of(tmp_path / "runs" / "cpu")[:4], rel=1e-3)
    first, expected = ranks_of(folder)[0], ranks_of(tmp_path / "runs" / "cpu")[0]
    assert sum(first.values()) == sum(expected.values())
    assert sum(abs(first[layer] - expected[layer]) for layer in first) <= 4


def without_times(path: Path) -> list[dict[str, Any]]:
    """A record's lines."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_lines(path)]


@pytest.mark.parametrize(("kind", "dtype"), [("bert", "fp32"), ("llama", "bf16")])
def test_a_deterministic_run_resumes_to_the_bit(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str
) -> None:
    """Killed in step 8, resumed from the checkpoint of step 6; the same metrics, ranks and adapter."""
    sections: dict[str, Any] = {"model": {"dtype": dtype}, "train": {"checkpoint_every": 3, "eval_every": 4}}
    trees = {name: run_tree(kind, tmp_path, models_dir, name, **sections) for name in ("whole", "killed")}
    for tree in trees.values():
        tree["run"]["deterministic"] = True
    reference = go(trees["whole"]).record.folder
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", killed_in_step(7))
        with pytest.raises(Killed):
            go(trees["killed"])
    folder = go(trees["killed"], resume="auto").record.folder
    for name in ("metrics.jsonl", "ranks.jsonl"):
        assert without_times(folder / name) == without_times(reference / name)
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, reference))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", ["bert", "bart"])
def test_answers_are_those_that_the_evaluation_judged(tmp_path: Path, models_dir: Path, kind: str) -> None:
    run = go(run_tree(kind, tmp_path, models_dir, "run", train={"max_steps": 9}))
    metrics = api.evaluate(run.config, run.record.folder)
    assert metrics == pytest.approx(result_of(run.record.folder)["metrics"], abs=1e-6)
    data = Path(str(run.config.task.dataset.path)) / "dev.jsonl"
    found = api.predict(data, tmp_path / "answers.jsonl", run=run.record.folder)
    rows = [json.loads(line) for line in found.out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == found.rows == 8
    if kind == "bert":
        right = sum(row["prediction"] == row["label"] for row in rows)
        assert right / len(rows) == pytest.approx(metrics["accuracy"])


def test_a_packed_base(tmp_path: Path, models_dir: Path) -> None:
    """4-bit layers stay packed through rank events, and are dequantised where they are listened to."""
    pytest.importorskip("bitsandbytes")
    run = go(run_tree("llama", tmp_path, models_dir, "run", model={"dtype": "bf16", "quantization": "nf4"}))
    assert all(map(math.isfinite, losses_of(run.record.folder)))
    assert len(ranks_of(run.record.folder)) == 2
    assert result_of(run.record.folder)["frozen_parameters"]["bytes"].get("uint8", 0) > 0
