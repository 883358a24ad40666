"""A user's mistake ends before the model is loaded: one line, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runs import run_tree, write_config
from tsqlora_scale.commands import main as cli

ROOT = Path(__file__).resolve().parents[2]

MISTAKES: dict[str, tuple[dict[str, dict[str, Any]], list[str]]] = {
    "schedule": ({"schedule": {"start": 50, "end": 60}}, ["schedule", "50", "60"]),
    "scoring after the end": ({"scoring": {"warmup_steps": 13}}, ["scoring.warmup_steps=13"]),
    "micro batch": ({"train": {"micro_batch_size": 8}}, ["batch_size", "micro_batch_size"]),
    "group": ({"sensitivity": {"group_size": 5}}, ["sensitivity.group_size=5"]),
    "target module": ({"adapter": {"target_modules": ["querry"]}}, ["querry", "query"]),
    "unknown key": ({"train": {"learning_rate": 1}}, ["train.learning_rate"]),
    "method": ({"adapter": {"method": "lara"}}, ["adapter.method", "lora"]),
    "fp16": ({"model": {"dtype": "fp16"}}, ["model.dtype='fp16'", "bf16"]),
    "model folder": ({"model": {"name_or_path": "./nowhere"}}, ["model.name_or_path", "./nowhere"]),
    "package": ({"model": {"name_or_path": "package:nowhere_at_all/x"}}, ["model.name_or_path", "nowhere_at_all"]),
    "column": ({"task": {"text": ["texxt"]}}, ["texxt", "text"]),
    "labels": ({"task": {"labels": ["no", "maybe"]}}, ["train.jsonl", "yes"]),
    "one label": ({"task": {"labels": ["no"]}}, ["task.labels"]),
    "length": ({"task": {"max_length": 4096}}, ["max_length", "64"]),
    "metric": ({"task": {"metrics": ["acuracy"]}}, ["acuracy", "accuracy"]),
    "wrong metric": ({"task": {"metrics": ["rouge1"]}}, ["rouge1"]),
    "ranks": ({"allocation": {"r_min": 9}}, ["allocation.r_min"]),
    "truth as a number": ({"train": {"batch_size": True}}, ["train.batch_size=True"]),
    "strata without labels": (
        {"task": {"type": "regression", "labels": None, "metrics": ["pearson"]}, "sampling": {"stratify": True}},
        ["sampling.stratify", "regression"],
    ),
    "weights": ({"scoring": {"weights": [1, 2]}}, ["scoring.weights"]),
}


@pytest.fixture
def config(tmp_path: Path, models_dir: Path, request: pytest.FixtureRequest) -> Path:
    tree = run_tree("bert", tmp_path, models_dir, "run")
    for section, values in getattr(request, "param", {}).items():
        tree[section] = tree[section] | values if section in tree else values
    return write_config(tmp_path / "config.yaml", tree)


@pytest.mark.parametrize(("config", "words"), MISTAKES.values(), ids=MISTAKES, indirect=["config"])
def test_mistake(
    config: Path, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tsqlora_scale.model.base_model.load_base", lambda *_, **__: pytest.fail("the model was loaded")
    )
    assert cli.train(["--config", str(config)]) == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert not (config.parent / "runs").exists()


def test_nf4_needs_bitsandbytes(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert cli.train(["--config", str(config), "model.quantization=nf4"]) == 2
    assert "bitsandbytes" in capsys.readouterr().err


def test_ranks_must_divide_the_batch(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("RANK", "0")
    assert cli.train(["--config", str(config)]) == 2
    assert "train.batch_size=12" in capsys.readouterr().err


def test_a_run_is_never_overwritten(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = config.parent / "runs" / "run"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("mine")
    assert cli.train(["--config", str(config)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (run_dir / "config.yaml").read_text() == "mine"


@pytest.mark.parametrize(("local_rank", "said"), [(1, ""), (0, "error on ")])
def test_one_rank_of_a_machine_speaks(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, local_rank: int, said: str
) -> None:
    """A file may be missing on another machine than rank 0's."""
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    assert cli.train(["--config", str(config), "train.lr=-1"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(said)
    assert message.count("\n") == (1 if said else 0)


def test_values_may_stand_anywhere(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train(["--config", str(config), "run.seed=7", "--dry-run", "train.lr=0.25"]) == 0
    out = capsys.readouterr().out
    assert "seed: 7" in out
    assert "lr: 0.25" in out


def test_a_folder_without_weights(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "hollow"
    shutil.copytree(yaml.safe_load(config.read_text())["model"]["name_or_path"], model)
    (model / "model.safetensors").unlink()
    assert cli.train(["--config", str(config), f"model.name_or_path={model}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: model.name_or_path=")
    assert "weights cannot be loaded" in message


def test_a_training_that_diverges(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["train.lr=1e30", "train.max_grad_norm=null", "train.lr_schedule=constant"]
    assert cli.train(["--config", str(config), *overrides]) == 2
    assert "diverged" in capsys.readouterr().err


def test_dry_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.train(["--config", str(config), "--dry-run", "train.lr=0.25"]) == 0
    out = capsys.readouterr().out
    assert "lr: 0.25" in out
    assert "events of the schedule: 2, after steps 4, 8" in out
    assert "scoring: after step 2" in out
    assert not (config.parent / "runs").exists()


def test_a_config_error_needs_no_torch(config: Path) -> None:
    code = (
        "import sys; from tsqlora_scale.commands import main as cli; "
        f"code = cli.train(['--config', {json.dumps(str(config))}, 'train.lrr=1']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"error: {config}: unknown key 'train.lrr'; did you mean 'train.lr'?\n"
