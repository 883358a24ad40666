"""What may not change a run, how long it is, and what its folder promises to others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.runs import go, read_lines, result_of, run_tree
from tests.steps import take_step
from tsqlora_scale.config.load import load_config, parse_config
from tsqlora_scale.quality.selectors.by_quality import QualitySelector
from tsqlora_scale.ranks import current_ranks
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run


def test_scoring_between_steps_leaves_no_trace(tmp_path: Path, models_dir: Path) -> None:
    """Not in the parameters, the moments, the sensitivities or the dropout masks: to the bit."""
    outcomes: list[tuple[Any, Any]] = []
    for scored_before in ((), (0, 3, 4, 7)):  # at the start, before and after rank events, in between
        tree = run_tree("bert", tmp_path, models_dir, f"scored-{len(scored_before)}", scoring={"warmup_steps": 12})
        tree["adapter"]["dropout"] = 0.1
        run = build_run(preflight.check(parse_config(tree)))
        assert isinstance(run.selector, QualitySelector)
        for step in range(8):
            if step in scored_before:
                run.selector.scorer.score(run.engine.module)
            take_step(run)
        outcomes.append((run.engine.gather(), current_ranks(run.engine.module)))
    (plain, plain_ranks), (scored, scored_ranks) = outcomes
    assert plain_ranks == scored_ranks
    assert set(plain_ranks.values()) != {4}, "an event that changes nothing would test little"
    for name, entry in plain.params.items():
        for part in ("value", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(entry, part), getattr(scored.params[name], part)), f"{part} of {name}"


def test_epochs_are_passes_over_the_subset(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", adapter={"method": "lora"})
    del tree["train"]["max_steps"]
    tree["train"]["epochs"] = 1.5
    run = go(tree)
    lines = [line for line in read_lines(tmp_path / "runs" / "run" / "metrics.jsonl") if "loss" in line]
    assert len(lines) == 6, "1.5 x 48 samples, 12 a step"
    assert run.seen.all(), "without replacement, a whole epoch sees every sample"
    assert {line["total_rank"] for line in lines} == {12 * 4}, "plain LoRA's ranks are fixed"


def test_run_folder_keeps_its_promises(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("bart", tmp_path, models_dir, "run")
    run = go(tree)
    run_dir = tmp_path / "runs" / "run"
    assert {p.name for p in run_dir.iterdir()} == {
        "config.yaml", "metrics.jsonl", "ranks.jsonl", "scores", "checkpoints", "adapter", "result.json",
    }  # fmt: skip
    assert load_config(run_dir / "config.yaml") == run.config

    steps = [line for line in read_lines(run_dir / "metrics.jsonl") if "loss" in line]
    events = read_lines(run_dir / "ranks.jsonl")
    for line in steps:
        assert line.keys() == {"step", "loss", "lr", "grad_norm", "samples_seen", "total_rank", "seconds"}
        before = [event for event in events if event["step"] < line["step"]]
        assert line["total_rank"] == sum(before[-1]["ranks"].values() if before else run.initial_ranks.values())
    assert [event["step"] for event in events] == [4, 8]
    for event in events:
        assert event.keys() >= {
            "step", "phi", "budget", "quality", "sensitivity", "ranks", "shrink_error", "seconds",
        }  # fmt: skip
        assert event["sensitivity"].keys() == event["ranks"].keys()
        assert event["budget"] == sum(event["ranks"].values()) == round(event["phi"] * 4 * len(event["ranks"]))
    assert events[0]["phi"] == 1

    scores = pq.read_table(run_dir / "scores" / "pass-000.parquet")
    assert set(scores.column_names) >= {
        "sample_id", "loss", "grad_norm", "delta_loss", "convergence", "quality", "probability", "selected",
        "scoring_pass",
    }  # fmt: skip
    assert scores.num_rows == 48
    assert sum(scores["selected"].to_pylist()) == 36

    result = result_of(run_dir)
    assert result.keys() >= {
        "metrics", "seconds", "samples_per_second", "peak_memory_bytes", "trainable_parameters", "world_size",
        "versions",
    }  # fmt: skip
    assert result["seconds"].keys() >= {"load", "warmup", "scoring", "training", "resizing", "evaluation"}
    assert result["versions"].keys() >= {"python", "torch", "transformers", "peft"}
    assert result["samples_drawn"] == steps[-1]["samples_seen"] == 13 * 12
    assert result["distinct_samples_seen"] == run.seen.sum()


@pytest.mark.parametrize("method", ["rslora", "dora"])
def test_pefts_own_methods_run_at_fixed_ranks(tmp_path: Path, models_dir: Path, method: str) -> None:
    go(run_tree("bert", tmp_path, models_dir, "run", adapter={"method": method}, train={"max_steps": 3}))
    run_dir = tmp_path / "runs" / "run"
    assert not (run_dir / "scores").exists()
    assert not (run_dir / "ranks.jsonl").exists()
    assert result_of(run_dir)["ranks_start"] == result_of(run_dir)["ranks_end"]
