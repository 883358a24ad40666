"""A run that is asked to stop leaves a checkpoint and exit code 0, or 130, and goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runs import go, losses_of, ranks_of, run_tree, write_config
from tests.steps import signalled_in_step
from tsqlora_scale.commands import main as cli
from tsqlora_scale.quality import BatchSampler, QualityScorer, ScoreTable
from tsqlora_scale.quality.scores.measurer import Measurer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("number", "code", "step"),
    [*((signal.SIGTERM, 0, step) for step in (0, 1, 3, 6, 11)), (signal.SIGUSR1, 0, 6), (signal.SIGINT, 130, 6)],
)
def test_a_signal_ends_the_run_after_the_step(
    tmp_path: Path,
    models_dir: Path,
    step: int,
    number: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Step 4 and 8 are followed by rank events and refreshes; no checkpoint is due anywhere."""
    go(run_tree("bert", tmp_path, models_dir, "whole"))
    config = write_config(tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "run"))
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(BatchSampler, "draw", signalled_in_step(step, number))
        assert cli.main(["train", "--config", str(config)]) == code
    assert signal.getsignal(number) is before
    run_dir = tmp_path / "runs" / "run"
    printed = capfd.readouterr()
    line = f"requeue: stopped on request after step {step + 1} of 13; the same command with --resume auto continues"
    assert line in printed.out
    assert ("Ctrl-C again ends at once" in printed.err) == (number == signal.SIGINT)
    assert (run_dir / "checkpoints" / f"step-{step + 1:08d}").is_dir()
    assert len(losses_of(run_dir)) == step + 1
    assert not (run_dir / "result.json").exists()
    assert cli.main(["train", "--config", str(config), "--resume", "auto"]) == 0
    assert losses_of(run_dir) == losses_of(tmp_path / "runs" / "whole")
    assert ranks_of(run_dir) == ranks_of(tmp_path / "runs" / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("command", ["train", "score"])
def test_a_signal_ends_the_first_pass_at_once(
    tmp_path: Path,
    models_dir: Path,
    command: str,
    number: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "whole", scoring={"shard_size": 16, "refresh": "none"})
    go(tree)
    tree["run"]["name"] = "run"
    config = write_config(tmp_path / "config.yaml", tree)
    chunks = 0
    original = Measurer._chunk

    def chunk(self: Measurer[Any], *arguments: Any, **options: Any) -> Any:
        nonlocal chunks
        chunks += 1
        if chunks == 6:  # in the second shard
            os.kill(os.getpid(), number)
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Measurer, "_chunk", chunk)
        assert cli.main([command, "--config", str(config)]) == code
    again = ["--resume", *(["auto"] if command == "train" else [])]
    assert f"scoring the pool; the same command with {' '.join(again)} continues" in capsys.readouterr().out
    run_dir = tmp_path / "runs" / "run"
    assert not list((run_dir / "scores").glob("pass-*.parquet"))
    assert cli.main([command, "--config", str(config), *again]) == 0
    found, expected = (ScoreTable.read(tmp_path / "runs" / name / "scores")[0] for name in ("run", "whole"))
    assert (found.quality == expected.quality).all()


def test_a_refresh_is_finished_first(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(run_tree("bert", tmp_path, models_dir, "whole"))
    config = write_config(tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "run"))
    score, refreshes = QualityScorer.score, []

    def signalled(scorer: QualityScorer, module: Any, *, refresh: bool, **options: Any) -> ScoreTable:
        refreshes.append(refresh)
        if refreshes == [False, True]:  # after step 4
            os.kill(os.getpid(), signal.SIGUSR1)
        return score(scorer, module, refresh=refresh, **options)

    with monkeypatch.context() as patch:
        patch.setattr(QualityScorer, "score", signalled)
        assert cli.main(["train", "--config", str(config)]) == 0
    run_dir = tmp_path / "runs" / "run"
    assert (run_dir / "checkpoints" / "step-00000005").is_dir(), "one step after the signal"
    assert cli.main(["train", "--config", str(config), "--resume", "auto"]) == 0
    assert losses_of(run_dir) == losses_of(tmp_path / "runs" / "whole")


def test_a_later_signal_stops_at_once() -> None:
    """But not one that comes with the first, from a launcher and the system above it."""
    program = """
import os, signal, sys
from tsqlora_scale.run import preemption
with preemption.StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested
    print("first", flush=True)
    preemption.SAME_REQUEST = 0
    os.kill(os.getpid(), signal.SIGTERM)
    print("never", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.split() == ["first"]
    assert done.returncode == -signal.SIGTERM


TWICE = """
import os, signal, sys, time
from tsqlora_scale.commands.guard import guard
from tsqlora_scale.run.preemption import StopRequest

def command():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and stop.interrupted
        for other in sys.argv[2:]:
            os.kill(os.getpid(), getattr(signal, other))
        print("first", flush=True)
        time.sleep(float(sys.argv[1]))
        os.kill(os.getpid(), signal.SIGINT)
        print("never", flush=True)

sys.exit(guard(command))
"""


@pytest.mark.parametrize("launcher", [{}, {"RANK": "0", "WORLD_SIZE": "1"}], ids=["alone", "launched"])
def test_a_second_ctrl_c_ends_at_once(launcher: dict[str, str]) -> None:
    """But not the one that a launcher passes on of the same key, nor the SIGTERM by which it ends its processes."""
    pause, passed_on = ("1.2", ["SIGINT", "SIGTERM"]) if launcher else ("0.2", [])
    done = subprocess.run(
        [sys.executable, "-c", TWICE, pause, *passed_on],
        capture_output=True, text=True, cwd=ROOT, check=False, env=os.environ | launcher,
    )  # fmt: skip
    assert done.stdout.split() == ["first"]
    assert done.returncode == 130
    assert done.stderr == "stopping after this step, with a checkpoint; Ctrl-C again ends at once\n"
