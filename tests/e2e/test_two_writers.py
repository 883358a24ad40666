"""One writer per run folder: a second run ends in one line, and a crash leaves the folder free."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import ROOT, run_launched
from tests.runs import go, losses_of, run_tree, write_config
from tests.tiny import tiny_model
from tsqlora_scale.commands import main as cli
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.launcher import strangers
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.run import preflight, run_lock
from tsqlora_scale.run.run_lock import LOCK, FolderLock, RunLock

HOLDER = """
import sys, time
from pathlib import Path
from tsqlora_scale.run import run_lock
run_lock.BEAT = 0.1
lock = run_lock.FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(120)
"""


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of ``folder``."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life in tenths of seconds."""
    monkeypatch.setattr(run_lock, "BEAT", 0.1)
    monkeypatch.setattr(run_lock, "WATCH", 1.0)


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that has none."""

    def missing(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)


COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "train": lambda file: ["train", "--config", file],
    "resumed": lambda file: ["train", "--config", file, "--resume", "auto"],
    "over it": lambda file: ["train", "--config", file, "--overwrite"],
    "score": lambda file: ["score", "--config", file],
    "with the proxy's": lambda file: ["train", "--config", file, "run.name=x"],
}


def test_nothing_writes_beside_a_run(tmp_path: Path, models_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "x-proxy", train={"max_steps": 9})
    plain = write_config(tmp_path / "config.yaml", tree)
    tree["scoring"] |= {"proxy_model": str(tiny_model("bert", models_dir)), "refresh": "none"}
    proxied = write_config(tmp_path / "proxied.yaml", tree)
    folder = tmp_path / "runs" / "x-proxy"
    with held_elsewhere(folder) as process:
        before = (folder / LOCK).read_text()
        for name, command in COMMANDS.items():
            file = str(proxied if "proxy" in name else plain)
            assert cli.main(command(file)) == 2, name
            error = capfd.readouterr().err.splitlines()[-1]
            assert error.startswith("error: "), error
            assert "being written by another run" in error
            assert f"host {platform.node()!r}, pid {process.pid}, since" in error
            assert "choose another run.name" in error
        assert [path.name for path in folder.iterdir()] == [LOCK]
        assert (folder / LOCK).read_text() == before
        assert not (tmp_path / "runs" / "x").exists()
        kill(process)
    assert cli.main(COMMANDS["train"](str(plain))) == 0, "free again after SIGKILL"
    assert not (folder / LOCK).exists()


def test_what_has_been_written_meanwhile_is_not_written_over(tmp_path: Path, models_dir: Path) -> None:
    """By a run that began and ended while this one was still checking its data."""
    config = parse_config(run_tree("bert", tmp_path, models_dir, "run"))
    checks = []

    def check() -> None:
        checks.append(sorted(path.name for path in config.run_dir.iterdir()))
        preflight.check_run_dir(config, overwrite=False, resume=None)

    config.run_dir.mkdir(parents=True)
    (config.run_dir / "result.json").write_text("{}")
    with RunLock([config.run_dir], check) as lock, pytest.raises(UserError, match="already holds a run"):
        lock.take(World())
    assert checks == [[LOCK, "result.json"]]
    assert [path.name for path in config.run_dir.iterdir()] == ["result.json"]


def test_a_lock_is_taken_once_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with RunLock([folder], lambda: None) as lock:
        lock.take(World())
        lock.take(World())
        with pytest.raises(UserError, match=f"pid {os.getpid()}"):
            FolderLock(folder)
        written = json.loads((folder / LOCK).read_text())
        assert (written["host"], written["pid"]) == (platform.node(), os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_removed_is_not_given_back_twice(tmp_path: Path) -> None:
    """The remedy of the message, and the first holder ends after all."""
    first = FolderLock(tmp_path)
    first.path.unlink()
    second = FolderLock(tmp_path)
    first.release()
    with pytest.raises(UserError, match="being written"):
        FolderLock(tmp_path)
    second.release()


@pytest.mark.usefixtures("quick")
def test_a_file_system_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life decide: of a holder at work, and of one that is gone."""
    without_flock(monkeypatch)
    with held_elsewhere(tmp_path) as process:
        with pytest.raises(UserError, match=f"pid {process.pid}.*remove .*{LOCK}"):
            FolderLock(tmp_path)
        kill(process)
        start = time.monotonic()
        FolderLock(tmp_path).release()
        assert 1 <= time.monotonic() - start < 10
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("alive", [True, False])
def test_a_flock_that_does_not_reach_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, alive: bool
) -> None:
    """As on a mount that keeps locks to one machine: they never meet."""
    with held_elsewhere(tmp_path) as process:
        monkeypatch.setattr(fcntl, "flock", lambda *_: None)
        monkeypatch.setattr(platform, "node", lambda: "another")
        if alive:
            with pytest.raises(UserError, match=f"pid {process.pid}"):
                FolderLock(tmp_path)
        else:
            kill(process)
            FolderLock(tmp_path).release()
    assert "waiting for 1 s whether it shows a sign of life" in caplog.text


def test_a_folder_that_takes_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"cannot be written.*No space left"):
        FolderLock(tmp_path / "run")
    assert not (tmp_path / "run").exists()


STARTED: dict[str, tuple[dict[str, str], tuple[str, int] | None]] = {
    "srun": ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, ("srun", 2)),
    "srun, an older one": ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, ("srun", 2)),
    "srun of one task in a job of two": (
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        None,
    ),
    "a job's shell": ({"SLURM_NTASKS": "2"}, None),
    "torchrun under srun": ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "RANK": "3", "WORLD_SIZE": "4"}, None),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, ("mpirun", 4)),
    "mpiexec": ({"PMI_SIZE": "3", "PMI_RANK": "2"}, ("mpirun", 3)),
    "mpirun of one": ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
    "nothing": ({}, None),
}


@pytest.mark.parametrize(("variables", "found"), STARTED.values(), ids=STARTED)
def test_tasks_that_know_nothing_of_one_another(
    variables: dict[str, str], found: tuple[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "MV2_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert strangers() == found


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("command", ["train", "score"])
def test_a_bare_srun_of_two_tasks(
    tmp_path: Path,
    models_dir: Path,
    rank: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "run"))
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", rank)
    assert cli.main([command, "--config", str(config)]) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert "srun has started 2 tasks" in error
    assert "srun --ntasks=1" in error
    assert "torchrun" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_two_runs_started_together(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"max_steps": 60})
    config = write_config(tmp_path / "config.yaml", tree)
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(config)]
    started = []
    for _ in range(2):
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        time.sleep(0.3)
    texts = [process.communicate(timeout=200)[0] for process in started]
    assert sorted(process.returncode for process in started) == [0, 2], texts
    (refused,) = (text for process, text in zip(started, texts, strict=True) if process.returncode == 2)
    assert "being written by another run" in refused or "already holds a run" in refused
    assert len(losses_of(tmp_path / "runs" / "run")) == 60


@pytest.mark.slow
@pytest.mark.distributed
def test_every_rank_ends(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run")
    go(tree)
    config = write_config(tmp_path / "config.yaml", tree)
    with held_elsewhere(tmp_path / "runs" / "run") as process:
        arguments = ["--config", str(config), "--resume", "auto"]
        done = run_launched("ddp-2", ROOT / "launch" / "train.py", arguments, tmp_path, timeout=120)
        assert done.returncode != 0
        assert sum(line.startswith("error: ") for line in done.stdout.splitlines()) == 1, done.stdout
        assert f"pid {process.pid}" in done.stdout
        assert "exitcode  : 2" in done.stdout
