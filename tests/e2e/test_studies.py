"""A study from its pools to its tables, on a tiny model, in processes of its own; started twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_model
from tests.unit.studies.small_data import write_small_data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "studies"


def call(script: str, *arguments: object) -> str:
    command = [sys.executable, str(FOLDER / f"{script}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_a_study(tmp_path: Path, models_dir: Path) -> None:
    data, pools, out = write_small_data(tmp_path / "data"), tmp_path / "pools", tmp_path / "out"
    call("pools", "--data", data, "--out", pools, "--seed", "0,100", "--pools", "flips", "--scale", 0.04)
    for seed in (0, 100):
        ids = [json.loads(line)["id"] for line in (pools / f"seed-{seed}/flips/train.jsonl").open(encoding="utf-8")]
        lines = ["sample_id,probability_wrong,suggested_label", *(f"{name},{i % 2},1" for i, name in enumerate(ids))]
        (pools / f"seed-{seed}/flips/audit.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    arms = "uniform;drop late;own stop;quality;random+q"
    command = ["--study", "noise", "--pools-dir", pools, "--model", tiny_model("bert", models_dir), "--out", out]
    command += [
        "--arms",
        arms,
        "--lrs",
        "1e-3",
        "--steps",
        4,
        "--baseline-steps",
        6,
        "--every",
        2,
        "scoring.warmup_steps=2",
    ]
    first = call("run", *command, "--tuning-seeds", "100", "--seeds", "0")
    assert "left out: 'random+q' on flips" in first
    assert "8 runs finished, 0 failed, 0 are left" in first
    assert "0 runs finished, 0 failed, 0 are left" in call("run", *command, "--tuning-seeds", "100", "--seeds", "0")
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    by_arm = {line["arm"]: line for line in lines}
    assert {line["error"] for line in lines} == {None}
    assert list(by_arm["uniform"]["curve"]) == ["0", "2", "4", "6"]
    assert list(by_arm["drop late"]["curve"]) == ["0", "2", "4"]
    assert by_arm["own stop"]["curve"]["2"].keys() == {"tune", "test", "own"}
    assert by_arm["quality"]["rows"] == 40
    assert 0 <= by_arm["quality"]["auc"] <= 1
    assert not list((out / "runs").iterdir())
    table = call("tables", out / "results.jsonl")
    assert "**flips** (accuracy; seeds 0)" in table
    assert all(f"| {arm} |" in table for arm in by_arm)
