"""A step whose loss or gradient is not finite is left out, named by its samples, and counted."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.poison import poisoned
from tests.runs import go, losses_of, read_lines, run_tree, write_config
from tsqlora_scale.commands import main as cli
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.run.checkpoint import read_checkpoint


def test_such_steps_change_nothing_and_are_recorded(
    tmp_path: Path, models_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One in the warm-up, one with a gradient alone, one of several micro-batches right before a rank event."""
    tree = run_tree(
        "bert", tmp_path, models_dir, "run", train={"checkpoint_every": 5, "checkpoint_keep": 9, "micro_batch_size": 2}
    )
    with poisoned(loss={(0, 2), (7, 0), (7, 5)}, gradient={(5, 1)}):
        go(tree)
    run_dir = tmp_path / "runs" / "run"
    lines = [line for line in read_lines(run_dir / "metrics.jsonl") if "eval" not in line]
    assert [line["step"] for line in lines] == list(range(1, 14))
    failed = {line["step"]: line["nonfinite"] for line in lines if "nonfinite" in line}
    assert {step: (said["count"], said["loss"], len(said["culprits"])) for step, said in failed.items()} == {
        1: (1, "nan", 1),
        6: (2, failed[6]["loss"], 0),
        8: (3, "nan", 2),
    }
    assert float(failed[6]["loss"]) > 0
    assert len(losses_of(run_dir)) == 10
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    for step, said in failed.items():
        assert len(said["sample_ids"]) == 12
        # micro-batches of two, in the order of the draw
        assert said["culprits"] == sorted((said["sample_ids"][i] for i in {1: [4], 6: [], 8: [0, 10]}[step]), key=int)
        (warning,) = (text for text in warnings if text.startswith(f"step {step} has a loss of"))
        assert ", ".join(said["sample_ids"]) in warning
    for step, count in ((5, 1), (10, 3)):
        assert read_checkpoint(run_dir / "checkpoints" / f"step-{step:08d}")[1]["nonfinite"] == count


@pytest.mark.parametrize("limit", [0, 1])
def test_too_many_end_the_run(tmp_path: Path, models_dir: Path, limit: int, capsys: pytest.CaptureFixture[str]) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"max_nonfinite": limit})
    config = write_config(tmp_path / "config.yaml", tree)
    with poisoned(loss={(3, 1), (6, 1)}):
        assert cli.main(["train", "--config", str(config)]) == 2
    (line,) = (text for text in capsys.readouterr().err.splitlines() if text.startswith("error: "))
    last = read_lines(tmp_path / "runs" / "run" / "metrics.jsonl")[-1]
    assert last["step"] == (4, 7)[limit]
    assert last["nonfinite"]["count"] == limit + 1
    assert f"train.max_nonfinite={limit}" in line
    assert ", ".join(last["nonfinite"]["sample_ids"]) in line
    assert f"not finite: {last['nonfinite']['culprits'][0]}" in line


def test_the_count_goes_on_after_a_resume(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"checkpoint_every": 4, "max_nonfinite": 1})
    places = {(2, 0), (9, 0)}
    with poisoned(loss=places), pytest.raises(UserError, match="max_nonfinite=1"):
        go(tree)
    with poisoned(loss=places), pytest.raises(UserError, match="max_nonfinite=1"):
        go(tree, resume="auto")
    tree["train"]["max_nonfinite"] = 2
    with poisoned(loss=places):
        run = go(tree, resume="auto")
    assert run.nonfinite.count == 2
    lines = [line["step"] for line in read_lines(tmp_path / "runs" / "run" / "metrics.jsonl") if "eval" not in line]
    assert lines == list(range(1, 14))
