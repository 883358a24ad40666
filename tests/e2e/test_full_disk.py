"""A disk that is full, or a file-size limit, costs a run its checkpoints of that time, and nothing else."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.runs import go, losses_of, ranks_of, read_lines, result_of, run_tree, write_config
from tsqlora_scale import cli
from tsqlora_scale.engine import checkpoint
from tsqlora_scale.engine.checkpoint import newest_checkpoint
from tsqlora_scale.quality.parts import Parts
from tsqlora_scale.report.record import RunRecord
from tsqlora_scale.run import Run


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond ``limit`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # Python ignores the signal, so writes fail
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def warnings_of(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and text in r.getMessage()]


@pytest.mark.parametrize("where", ["save_file", "_fsync", "_replace", "os.fsync", "a real limit"])
def test_a_checkpoint_that_cannot_be_written(
    tmp_path: Path, models_dir: Path, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That of step 6; those of step 3 and 9 are."""
    changes: dict[str, Any] = {"checkpoint_every": 3, "checkpoint_keep": 1}
    go(run_tree("bert", tmp_path, models_dir, "whole", train=changes))
    caplog.clear()
    write: Callable[..., None] = Run._write_checkpoint
    seen: dict[int, list[str]] = {}

    def sometimes(run: Run, state: Any) -> None:
        failing = run.step == 6
        with monkeypatch.context() as patch:
            if failing and where == "os.fsync":
                patch.setattr(os, "fsync", full)
            elif failing and where != "a real limit":
                patch.setattr(checkpoint, where, full)
            if failing and where == "a real limit":
                with small_files(20_000):
                    write(run, state)
            else:
                write(run, state)
        seen[run.step] = sorted(path.name[-8:] for path in (run.record.folder / "checkpoints").iterdir())

    monkeypatch.setattr(Run, "_write_checkpoint", sometimes)
    go(run_tree("bert", tmp_path, models_dir, "run", train=changes))
    folder, reference = tmp_path / "runs" / "run", tmp_path / "runs" / "whole"
    assert losses_of(folder) == losses_of(reference)
    (said,) = warnings_of(caplog, "cannot be written")
    assert said.startswith("the checkpoint of step 6 cannot be written (")
    assert said.endswith("its newest checkpoint is step-00000003")
    assert seen == {
        2: ["00000002"],
        3: ["00000003"],
        6: ["00000003"],
        9: ["00000009"],
        12: ["00000012"],
        13: ["00000013"],
    }
    assert result_of(folder)["best"] == result_of(reference)["best"]
    assert newest_checkpoint(folder / "checkpoints") == folder / "checkpoints" / "step-00000013"


def test_the_best_that_was_written_is_kept(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations get better and better; the checkpoint of the last but one cannot be written."""
    changes: dict[str, Any] = {"checkpoint_every": 1, "checkpoint_keep": 1, "eval_every": 4}
    monkeypatch.setattr(Run, "evaluate", lambda run: {"accuracy": {4: 0.5, 8: 0.7, 12: 0.9}.get(run.step, 0.1)})
    write = Run._write_checkpoint

    def sometimes(run: Run, state: Any) -> None:
        with monkeypatch.context() as patch:
            if run.step == 12:
                patch.setattr(checkpoint, "save_file", full)
            write(run, state)

    monkeypatch.setattr(Run, "_write_checkpoint", sometimes)
    go(run_tree("bert", tmp_path, models_dir, "run", train=changes))
    folder = tmp_path / "runs" / "run"
    assert [path.name[-2:] for path in sorted((folder / "checkpoints").iterdir())] == ["08", "13"]
    assert result_of(folder)["best"] == {"step": 12, "metric": "accuracy", "value": 0.9, "checkpoint": None}


def test_lines_wait_until_they_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record = RunRecord(tmp_path, writes=True)
    record.metrics(step=1)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with small_files(size + 5):
        record.metrics(step=2)
        assert (tmp_path / "metrics.jsonl").stat().st_size == size, "no half line"
        record.metrics(step=3)
    record.metrics(step=4)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert len(warnings_of(caplog, "cannot be written")) == 1
    with small_files(size):
        record.metrics(step=5)
    record.result({})
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert len(warnings_of(caplog, "cannot be written")) == 2
    assert not warnings_of(caplog, "are lost")


def test_a_pass_goes_on_in_memory(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Four shards; the disk is full in the third, and the fourth is not tried. Nor are the scores."""
    changes: dict[str, dict[str, Any]] = {"scoring": {"shard_size": 12, "refresh": "none"}}
    go(run_tree("bert", tmp_path, models_dir, "whole", **changes))
    append = Parts.append

    def sometimes(parts: Parts, rows: Any) -> None:
        with monkeypatch.context() as patch:
            if len(parts) == 2:
                patch.setattr(os, "fsync", full)
            append(parts, rows)
        assert parts.folder is not None
        assert (
            sorted(path.name for path in parts.folder.iterdir()) == [f"{n:06d}.parquet" for n in range(2)][: len(parts)]
        )

    monkeypatch.setattr(Parts, "append", sometimes)
    monkeypatch.setattr("tsqlora_scale.quality.ScoreTable.write", full)
    go(run_tree("bert", tmp_path, models_dir, "run", **changes))
    folder, reference = tmp_path / "runs" / "run", tmp_path / "runs" / "whole"
    assert losses_of(folder) == losses_of(reference)
    assert ranks_of(folder) == ranks_of(reference)
    assert len(warnings_of(caplog, "goes on in memory")) == 1
    assert len(warnings_of(caplog, "the scores cannot be written")) == 1


@pytest.mark.parametrize("what", ["the adapter", "result.json"])
def test_an_end_that_cannot_be_written(
    tmp_path: Path, models_dir: Path, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "run"))
    with monkeypatch.context() as patch:
        if what == "the adapter":
            patch.setattr("tsqlora_scale.run.save_adapter", full)
        else:
            patch.setattr(RunRecord, "result", full)
        assert cli.main(["train", "--config", str(config)]) == 2
    assert f"error: {what}" in (said := capsys.readouterr().err)
    assert "--resume auto goes on" in said
    assert cli.main(["train", "--config", str(config), "--resume", "auto"]) == 0
    lines = read_lines(tmp_path / "runs" / "run" / "metrics.jsonl")
    assert sum("eval" in line for line in lines) == 2
    assert json.loads((tmp_path / "runs" / "run" / "result.json").read_text())["steps"] == 13
