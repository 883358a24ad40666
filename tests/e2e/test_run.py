"""Whole runs in one process on tiny models: the adapter that leaves, the trajectory, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from tests.runs import TASKS, go, losses_of, ranks_of, read_lines, result_of, run_tree
from tests.tiny import AUTO
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run, evaluate_adapter
from tsqlora_scale.run.resume import find_checkpoint


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [*((kind, "none") for kind in sorted(TASKS)), ("bert", "nf4"), ("gpt2", "nf4")],
)
def test_adapter_is_plain_peft(tmp_path: Path, models_dir: Path, kind: str, quantization: str) -> None:
    tree = run_tree(kind, tmp_path, models_dir, "run", model={"quantization": quantization})
    run = go(tree)
    adapter = tmp_path / "runs" / "run" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert len(set(config["rank_pattern"].values())) > 1, "ranks that are all equal would test nothing"
    assert config["alpha_pattern"] == {name: 2.0 * rank for name, rank in config["rank_pattern"].items()}

    auto = AUTO.get(kind, AutoModelForSequenceClassification)
    options: dict[str, Any] = {} if kind in AUTO else {"num_labels": 2}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["bert.pooler.dense", "classifier", "lm_head"],
        )  # fmt: skip
    fresh = PeftModel.from_pretrained(auto.from_pretrained(tree["model"]["name_or_path"], **options), str(adapter))
    fresh.eval()
    for module in fresh.modules():  # matrices smaller than a quantisation block cannot be repacked for this CPU
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    ids = torch.randint(5, 30, (3, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind in ("bart", "t5"):
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        trained = run.engine.module.eval()(**inputs).logits
        torch.testing.assert_close(fresh(**inputs).logits, trained, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_evaluating_the_adapter_gives_the_same_metrics(tmp_path: Path, models_dir: Path, kind: str) -> None:
    tree = run_tree(kind, tmp_path, models_dir, "run")
    go(tree)
    metrics = evaluate_adapter(preflight.check(parse_config(tree)), str(tmp_path / "runs" / "run" / "adapter"))
    assert metrics == pytest.approx(result_of(tmp_path / "runs" / "run")["metrics"], abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_accumulation_does_not_change_the_run(tmp_path: Path, models_dir: Path, kind: str) -> None:
    for micro in (12, 6, 4, 2, 1):
        go(run_tree(kind, tmp_path, models_dir, f"m{micro}", train={"micro_batch_size": micro}))
    runs = tmp_path / "runs"
    for micro in (6, 4, 2, 1):
        assert losses_of(runs / f"m{micro}") == pytest.approx(losses_of(runs / "m12"), abs=1e-5)
        assert ranks_of(runs / f"m{micro}") == ranks_of(runs / "m12")


@pytest.mark.parametrize("step", [1, 2, 3, 4, 8, 12])
def test_resume_is_bit_identical(tmp_path: Path, models_dir: Path, step: int) -> None:
    """Before and after scoring (step 2), right after rank events (4, 8), in between."""
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"checkpoint_every": 1, "checkpoint_keep": 99})
    tree["adapter"]["dropout"] = 0.1
    run_dir = tmp_path / "runs" / "run"
    whole = go(tree)
    losses, ranks, seen = losses_of(run_dir), ranks_of(run_dir), whole.seen
    for checkpoint in (run_dir / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    resumed = go(tree, resume="auto")
    assert losses_of(run_dir) == losses
    assert ranks_of(run_dir) == ranks
    assert (resumed.seen == seen).all()


def test_resume_without_a_checkpoint_starts_anew(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run")
    go(tree)
    shutil.rmtree(tmp_path / "runs" / "run" / "checkpoints")
    go(tree, resume="auto")
    assert len(losses_of(tmp_path / "runs" / "run")) == 13


def test_checkpoints_are_whole_small_and_safe(
    tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"checkpoint_every": 4, "checkpoint_keep": 2})
    go(tree)
    run_dir = tmp_path / "runs" / "run"
    folders = sorted((run_dir / "checkpoints").iterdir())
    assert [f.name for f in folders] == ["step-00000012", "step-00000013"]
    files = [f for f in folders[-1].iterdir() if f.is_file()]
    assert {f.suffix for f in files} == {".json", ".safetensors"}
    adapter_bytes = 4 * result_of(run_dir)["trainable_parameters"]
    assert sum(f.stat().st_size for f in files) <= 3.2 * adapter_bytes + 5e6
    damaged = folders[-1] / "parameters.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=r"parameters\.safetensors"):
        build_run(preflight.check(parse_config(tree)), resume=str(folders[-1]))
    assert find_checkpoint(run_dir, "auto") == folders[0]
    assert "parameters.safetensors' is missing or damaged; trying the one before it" in caplog.text
    tree["train"]["lr"] = 0.5
    with pytest.raises(UserError, match=r"train\.lr"):
        build_run(preflight.check(parse_config(tree)), resume=str(folders[0]))
    for manifest in ("{", "[]", "{}"):
        (folders[0] / "manifest.json").write_text(manifest)
        with pytest.raises(UserError, match=r"no checkpoint in .* is undamaged"):
            find_checkpoint(run_dir, "auto")


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"method": "lora"}},
        {"sensitivity": {"enabled": False}},
        {"scoring": {"enabled": False}, "sampling": {"selector": "full"}},
        {"scoring": {"enabled": False}, "sampling": {"selector": "random", "keep_fraction": 0.5}},
    ],
    ids=["lora", "without-sensitivity", "without-quality", "random-subset"],
)
def test_ablations(tmp_path: Path, models_dir: Path, sections: dict[str, Any]) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", **sections)
    config = parse_config(tree)
    run = go(tree)
    run_dir = tmp_path / "runs" / "run"
    assert (run_dir / "scores").exists() == config.scores_data
    assert (run_dir / "ranks.jsonl").exists() == config.adapts_ranks
    if config.sampling.selector == "random":
        assert run.seen.sum() <= 24
    if config.scores_data:  # the pool, and a refresh at each event, with or without ranks that change
        assert len(list((run_dir / "scores").glob("*.parquet"))) == 3


def test_run_folder(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"eval_every": 5})
    go(tree)
    run_dir = tmp_path / "runs" / "run"
    result = result_of(run_dir)
    lines = read_lines(run_dir / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 14))
    assert [line["samples_seen"] for line in steps] == [12 * step for step in range(1, 14)]
    assert [line["step"] for line in lines if "eval" in line] == [0, 5, 10, 13]
    for event in read_lines(run_dir / "ranks.jsonl"):
        assert sum(event["ranks"].values()) == event["budget"]
        assert sum(event["sensitivity"].values()) == pytest.approx(1)
        assert event["reasons"].keys() == event["ranks"].keys()
        assert all(0 <= error <= 1 for error in event["shrink_error"].values())
    assert result["best"]["value"] >= result["metrics"]["accuracy"]
    assert (run_dir / result["best"]["checkpoint"]).is_dir()
    assert set(result["seconds"]) >= {"load", "warmup", "scoring", "training", "resizing", "evaluation"}
    assert result["subset_size"] == 36
    assert len(list((run_dir / "scores").glob("*.parquet"))) == 3  # the pool, and a refresh after each event
    tree["run"]["name"] = "again"  # the same seed gives the same run
    go(tree)
    assert losses_of(tmp_path / "runs" / "again") == losses_of(run_dir)
