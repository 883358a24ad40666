"""The examples run as they say, without a change to the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runs import go, losses_of, ranks_of, run_tree, write_config
from tsqlora_scale.commands.main import main
from tsqlora_scale.config.extensions import load_extension

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def named(file: str, name: str) -> str:
    return f"{EXAMPLES / file}:{name}"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_they_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60


def test_the_policy(tmp_path: Path, models_dir: Path) -> None:
    go(run_tree("bert", tmp_path, models_dir, "run", allocation={"policy": named("policy.py", "LaterLayers")}))
    first, second = ranks_of(tmp_path / "runs" / "run")
    assert first == second
    assert sum(first.values()) == 48
    assert list(first.values()) == sorted(first.values())
    assert len(set(first.values())) > 3


def test_the_selector(tmp_path: Path, models_dir: Path) -> None:
    """Also after a resume; the command reads it from a file beside it."""
    tree = run_tree(
        "bert", tmp_path, models_dir, "run", sampling={"selector": named("selector.py", "ShortFirst")},
        train={"checkpoint_every": 5, "checkpoint_keep": 9},
    )  # fmt: skip
    run = go(tree)
    lengths = run.task.lengths()
    drawn = [lengths[run.selector.draw(step)] for step in range(13)]
    assert drawn[0].max() <= np.sort(lengths)[4]
    assert max(batch.max() for batch in drawn[7:]) > np.sort(lengths)[24]
    whole = losses_of(tmp_path / "runs" / "run")
    config = write_config(tmp_path / "config.yaml", tree)
    resume = str(tmp_path / "runs" / "run" / "checkpoints" / "step-00000005")
    assert main(["train", "--config", str(config), "--resume", resume]) == 0
    assert losses_of(tmp_path / "runs" / "run") == whole


def test_the_task(tmp_path: Path, models_dir: Path) -> None:
    go(run_tree("bert", tmp_path, models_dir, "run", task={"objective": named("task.py", "FocalLoss")}))
    go(run_tree("bert", tmp_path, models_dir, "plain"))
    focal, plain = (losses_of(tmp_path / "runs" / name) for name in ("run", "plain"))
    assert len(focal) == 13
    assert focal[0] < plain[0]
    logits, targets = torch.tensor([[2.0, -1.0], [0.0, 0.5]]), torch.tensor([0, 0])
    objective = load_extension(named("task.py", "FocalLoss"), key="task.objective")
    losses, _ = objective.losses(objective, logits, targets)
    p = torch.softmax(logits, 1)[:, 0]
    torch.testing.assert_close(losses, -((1 - p) ** 2) * p.log())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("allocation.policy=examples/nothing.py:X", "cannot be imported"),
        ("allocation.policy=examples/policy.py:Nothing", "defines no 'Nothing'"),
        ("allocation.policy=examples/task.py:FocalLoss", "is no policy, it lacks plan"),
        ("sampling.selector=examples/policy.py:LaterLayers", "is no selector, it lacks"),
        ("task.objective=examples/policy.py:LaterLayers", "is no objective, it lacks"),
        ("sampling.selector=best", "is none of 'full', 'random', "),
        ("task.objective=mine", "FILE.py:NAME"),
    ],
)
def test_mistakes(
    override: str, words: str, tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(EXAMPLES.parent)
    config = write_config(tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "run"))
    assert main(["train", "--config", str(config), override]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert override.split("=")[0] in line
    assert words in line
