"""A comparison of real runs, by the command: what result.json says, tables, a second start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.runs import result_of, run_tree, write_config
from tsqlora_scale.common.code_version import source_digest
from tsqlora_scale.common.errors import Stopped
from tsqlora_scale.comparison.comparison_run import ComparisonRun, mean_tokens
from tsqlora_scale.config.load import load_config, parse_config
from tsqlora_scale.run import preflight

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def file(tmp_path: Path, models_dir: Path) -> Path:
    write_config(tmp_path / "words.yaml", run_tree("bert", tmp_path, models_dir, "words"))
    comparison = {
        "tasks": {"words": {"config": str(tmp_path / "words.yaml")}},
        "arms": {"tsqlora": {}, "broken": {"sampling.selector": "file", "sampling.file": "none.tsv"}},
        "seeds": [3],
        "budget": {"steps": 9},
    }
    path = tmp_path / "comparison.yaml"
    path.write_text(yaml.safe_dump(comparison, sort_keys=False), encoding="utf-8")
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "compare.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_a_comparison(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--config", str(file), "--out", str(out), "sampling.keep_fraction=0.75"]
    done = run(*arguments)
    assert done.returncode == 1, done.stderr  # one of the arms has no file to read
    assert "[1/2] broken on words, seed 3: FAILED, " in done.stderr
    result = result_of(out / "runs" / "words" / "tsqlora" / "seed3")
    assert (result["seed"], result["steps"]) == (3, 9)
    assert result["task"]["decides"] == "accuracy" and result["task"]["higher_is_better"]
    assert result["model"]["name"].endswith("bert") and result["model"]["dtype"] == "fp32"
    assert result["code"]["source"] == source_digest()
    assert {name: len(digest) for name, digest in result["data"].items()} == {"train": 64, "dev": 64}
    assert f"code {result['code']['version']} ({result['code']['source'][:8]})" in done.stdout
    again = ComparisonRun(file, out=out, overrides=arguments[4:])
    assert again.plan() == ["finished: tsqlora on words, seed 3", "to run: broken on words, seed 3"]
    assert list(again.report().failed) == ["broken on words, seed 3"]


def test_the_command_says_what_is_wrong(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tsqlora_scale.commands.compare import main

    for words, said in {
        (): "--config is missing",
        ("--config", str(tmp_path / "none.yaml")): "none.yaml' does not exist",
        ("--config", str(file), "--shard", "3/3"): "--shard '3/3'",
        ("--config", str(file), "--small"): "no section 'small'",
        ("--config", str(file), "--workers", "0"): "--workers 0",
        ("--config", str(file), "--dry-run", "adapter.rank=3"): "adapter.rank",
        ("--figures-of", str(tmp_path)): "no finished run",
    }.items():
        assert main(list(words)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert main(["--config", str(file), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "to run: tsqlora on words, seed 3" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_tokens_of_a_pool(file: Path) -> None:
    config = load_config(file.parent / "words.yaml")
    whole = mean_tokens(config)
    assert 4 <= whole <= 12  # four to ten words, and two special tokens at most
    shorter = load_config(file.parent / "words.yaml", ["task.max_length=4"])
    assert mean_tokens(shorter) == 4.0


def test_tokens_of_texts_to_be_written(tmp_path: Path, models_dir: Path) -> None:
    """Input and target."""
    tree = run_tree("t5", tmp_path, models_dir, "run")
    found = mean_tokens(load_config(write_config(tmp_path / "texts.yaml", tree)))
    task = preflight.check(parse_config(tree)).task
    batch = task.batch(np.arange(len(task)))
    inputs, targets = int(batch.inputs["attention_mask"].sum()), int((batch.targets != -100).sum())
    assert targets > 0
    assert found == pytest.approx((inputs + targets) / len(task))


def test_a_comparison_that_is_asked_to_stop_is_not_done(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tsqlora_scale.commands.compare import main

    def stopped(self: object, launch: object) -> None:
        raise Stopped("asked to stop")

    monkeypatch.setattr("tsqlora_scale.comparison.comparison_run.ComparisonRun.run", stopped)
    assert main(["--config", str(file), "--out", str(file.parent / "out")]) == 1
