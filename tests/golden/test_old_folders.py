"""What release 0.1 has written still opens: configs, checkpoints, adapters and scores."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.runs import losses_of, ranks_of, read_lines
from tests.tiny import tiny_model
from tsqlora_scale.commands.main import main
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import load_config
from tsqlora_scale.quality import ScoreTable
from tsqlora_scale.run.checkpoint import read_checkpoint
from tsqlora_scale.run.old_checkpoints import of_today
from tsqlora_scale.run.resume import same_method

WRITTEN = Path(__file__).with_name("written_by_0_1")
#: run -> what its config says in today's keys: type, selector, policy
RUNS = {
    "old": ("lora", "quality", "tsqlora"),
    "old-lora": ("lora", "full", "fixed"),
    "old-ablation": ("lora", "random", "fixed"),
}


#: SHA-256 of the base that the old runs were trained on, which is made anew.
BASE = "7cf2a8cc80ef86c14e7a2d05c5c440852439e763a7808bc9c2e0e6a5174f361f"


@pytest.fixture
def place(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old folders, and the model beside them, as the configs' relative paths say."""
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    (tmp_path / "folders").rename(tmp_path / "runs")
    shutil.copytree(tiny_model("bert", models_dir), tmp_path / "models" / "bert")
    weights = (tmp_path / "models" / "bert" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == BASE, "the tiny model is no longer that of the old runs"
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("run", RUNS)
def test_a_config_says_what_it_said(run: str, place: Path) -> None:
    config = load_config(f"runs/{run}/config.yaml")
    assert (config.adapter.type, config.sampling.selector, config.allocation.policy) == RUNS[run]
    (place / "again.yaml").write_text(config.to_yaml())
    assert load_config("again.yaml") == config, "in today's keys too"


def test_a_method_on_the_command_line_wins_over_the_keys_of_the_file(place: Path) -> None:
    """Over those that it stands for, and not over keys that are given beside it."""
    resolved = place / "resolved.yaml"
    resolved.write_text(load_config("runs/old/config.yaml").to_yaml())
    config = load_config(resolved, ["adapter.method=rslora", "sampling.selector=random"])
    assert (config.adapter.type, config.sampling.selector, config.allocation.policy) == ("rslora", "random", "fixed")


@pytest.mark.parametrize("how", ["auto", "by name"])
@pytest.mark.parametrize("run", RUNS)
def test_a_checkpoint_goes_on(run: str, how: str, place: Path) -> None:
    """To the losses and ranks that the old run had."""
    folder = place / "runs" / run
    expected: dict[str, Any] = {"losses": losses_of(folder), "ranks": ranks_of(folder) if run == "old" else []}
    resume = "auto" if how == "auto" else str(folder / "checkpoints" / "step-00000005")
    assert main(["train", "--config", f"runs/{run}/config.yaml", "--resume", resume]) == 0
    assert losses_of(folder) == pytest.approx(expected["losses"], abs=1e-5)
    if run == "old":
        assert ranks_of(folder) == expected["ranks"]
    state = json.loads((folder / "checkpoints" / "step-00000013" / "state.json").read_text())
    assert state["config"]["allocation"]["policy"] == RUNS[run][2]


@pytest.mark.parametrize("run", RUNS)
def test_a_checkpoint_goes_on_in_another_folder(run: str, place: Path) -> None:
    """Which gets the steps and events after it; the old folder stays as it is."""
    old, new = place / "runs" / run, place / "runs" / "resumed"
    files = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    checkpoint = f"runs/{run}/checkpoints/step-00000005"
    assert main(["train", "--config", f"runs/{run}/config.yaml", "--resume", checkpoint, "run.name=resumed"]) == 0
    assert [line["step"] for line in read_lines(new / "metrics.jsonl") if "loss" in line] == list(range(6, 14))
    assert losses_of(new) == pytest.approx(losses_of(old)[5:], abs=1e-5)
    if run == "old":
        assert ranks_of(new) == ranks_of(old)[1:]
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("run", RUNS)
def test_an_adapter_is_evaluated_and_exported(run: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = f"runs/{run}/adapter"
    assert main(["evaluate", "--config", f"runs/{run}/config.yaml", "--adapter", adapter]) == 0
    metrics = json.loads((place / "runs" / run / "result.json").read_text())["metrics"]
    assert f"accuracy: {metrics['accuracy']:.6f}" in capsys.readouterr().out
    assert main(["export", "--adapter", adapter, "--format", "padded", "--out", "padded"]) == 0


@pytest.mark.parametrize("command", ["train", "train --resume auto", "score", "evaluate --adapter runs/old/adapter"])
def test_data_chosen_by_the_development_set_is_refused(
    command: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder that says so in its config and its checkpoint."""
    for path in (place / "runs" / "old").rglob("*"):
        if path.name in ("config.yaml", "state.json"):
            text = path.read_text().replace("convergence: alignment", "convergence: target")
            path.write_text(text.replace('"convergence": "alignment"', '"convergence": "target"'))
    name, *options = command.split()
    assert main([name, "--config", "runs/old/config.yaml", *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert "runs/old/config.yaml: scoring.convergence: 'target' is gone" in said.err


def test_a_checkpoint_of_data_chosen_by_the_development_set_is_refused(place: Path) -> None:
    _, tree = read_checkpoint(place / "runs" / "old" / "checkpoints" / "step-00000005")
    tree["config"]["scoring"]["convergence"] = "target"
    with pytest.raises(UserError, match="'target' is gone"):
        of_today(tree)


def test_keys_that_a_checkpoint_does_not_know_are_at_their_defaults(place: Path) -> None:
    """One of an earlier version in today's form: what has come since does not make it another run's."""
    config = load_config("runs/old/config.yaml")
    written = config.model_dump(mode="json")
    for key in ("quoting", "exclude", "weight"):
        del written["task"]["dataset"][key]
    tree = of_today({"selector": {}, "config": written})
    same_method(config, tree["config"], None)
    with pytest.raises(UserError, match=r"was written with task.dataset"):
        same_method(load_config("runs/old/config.yaml", ["task.dataset.quoting=none"]), tree["config"], None)


def test_scores_are_read(place: Path) -> None:
    table, ids = ScoreTable.read("runs/old/scores")
    assert len(table) == len(ids) == 48
    assert table.selected.sum() == 36
