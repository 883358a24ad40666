"""A disk that is full, or a file-size limit, costs a run its checkpoints of that time, and nothing else."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.disks import full
from tests.distributed.launch import run_launched
from tests.runs import go, losses_of, ranks_of, read_lines, result_of, run_tree, write_config
from tests.steps import signalled_in_step
from tests.tiny import tiny_model
from tsqlora_scale.commands import main as cli
from tsqlora_scale.common.errors import Stopped
from tsqlora_scale.quality import BatchSampler, ScoreTable
from tsqlora_scale.quality.scores.measurer import Measurer
from tsqlora_scale.quality.scores.score_parts import Parts, PassPart
from tsqlora_scale.quality.selectors.by_quality import QualitySelector
from tsqlora_scale.report.record import RunRecord
from tsqlora_scale.run import checkpoint, run_checkpoints
from tsqlora_scale.run.checkpoint import newest_checkpoint
from tsqlora_scale.run.run_checkpoints import RunCheckpoints
from tsqlora_scale.run.training_run import Run


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


@pytest.mark.parametrize("where", ["save_file", "fsync", "_replace", "os.fsync", "a real limit"])
def test_a_checkpoint_that_cannot_be_written(
    tmp_path: Path, models_dir: Path, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That of step 6; those of step 3 and 9 are."""
    changes: dict[str, Any] = {"checkpoint_every": 3, "checkpoint_keep": 1}
    go(run_tree("bert", tmp_path, models_dir, "whole", train=changes))
    caplog.clear()
    write: Callable[..., None] = RunCheckpoints.write
    seen: dict[int, list[str]] = {}

    def sometimes(checkpoints: RunCheckpoints, step: int, *arguments: Any, **options: Any) -> None:
        failing = step == 6
        with monkeypatch.context() as patch:
            if failing and where == "os.fsync":
                patch.setattr(os, "fsync", full)
            elif failing and where != "a real limit":
                patch.setattr(checkpoint, where, full)
            if failing and where == "a real limit":
                with small_files(20_000):
                    write(checkpoints, step, *arguments, **options)
            else:
                write(checkpoints, step, *arguments, **options)
        seen[step] = sorted(path.name[-8:] for path in checkpoints.root.iterdir())

    monkeypatch.setattr(RunCheckpoints, "write", sometimes)
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
    write = RunCheckpoints.write

    def sometimes(checkpoints: RunCheckpoints, step: int, *arguments: Any, **options: Any) -> None:
        with monkeypatch.context() as patch:
            if step == 12:
                patch.setattr(checkpoint, "save_file", full)
            write(checkpoints, step, *arguments, **options)

    monkeypatch.setattr(RunCheckpoints, "write", sometimes)
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

    def end() -> None:
        with record:
            record.metrics(step=6)
            record.flush()
            raise Stopped

    with small_files(size), pytest.raises(Stopped):
        end()
    assert len(warnings_of(caplog, "cannot be written")) == 3, "once for each time that the disk is full"
    assert warnings_of(caplog, "are lost") == [f"1 lines of {tmp_path / 'metrics.jsonl'} are lost"]


def test_lines_wait_where_the_file_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a mount that is lost."""
    record = RunRecord(tmp_path, writes=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", full)
        record.metrics(step=1)
    record.metrics(step=2)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_lines_that_wait_are_written_before_a_checkpoint(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that resumes from it does not write them again."""
    append, written = RunRecord._append, run_checkpoints.write_checkpoint
    seen: dict[int, int] = {}

    def waits(record: RunRecord, name: str, line: dict[str, Any]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", full)
            append(record, name, line)

    def spy(folder: Path, *arguments: Any) -> None:
        seen[int(folder.name[-8:])] = len(losses_of(tmp_path / "runs" / "run"))
        written(folder, *arguments)

    monkeypatch.setattr(RunRecord, "_append", waits)
    monkeypatch.setattr(run_checkpoints, "write_checkpoint", spy)
    go(run_tree("bert", tmp_path, models_dir, "run", train={"checkpoint_every": 6}))
    assert seen == {step: step for step in (2, 6, 12, 13)}
    assert len(ranks_of(tmp_path / "runs" / "run")) == 2


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
            patch.setattr("tsqlora_scale.model.adapters.lora.LoraAdapter.save", full)
        else:
            patch.setattr(RunRecord, "result", full)
        assert cli.main(["train", "--config", str(config)]) == 2
    assert f"error: {what}" in (said := capsys.readouterr().err)
    assert "make room there, then resume" in said
    assert cli.main(["train", "--config", str(config), "--resume", "auto"]) == 0
    lines = read_lines(tmp_path / "runs" / "run" / "metrics.jsonl")
    assert sum("eval" in line for line in lines) == 2
    assert json.loads((tmp_path / "runs" / "run" / "result.json").read_text())["steps"] == 13


@pytest.mark.parametrize(
    ("step", "full_from", "lost"),
    [
        (0, 0, "all, as there is no checkpoint, is lost"),
        (1, 0, "all, as there is no checkpoint, is lost"),
        (6, 5, "all after checkpoint step-00000004 is lost"),
    ],
)
def test_a_stop_that_loses_the_state_says_so(
    tmp_path: Path,
    models_dir: Path,
    step: int,
    full_from: int,
    lost: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is no requeueing with exit code 0."""
    changes: dict[str, Any] = {"checkpoint_every": 4}
    go(run_tree("bert", tmp_path, models_dir, "whole", train=changes))
    config = write_config(tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "run", train=changes))
    with monkeypatch.context() as patch:
        patch.setattr(BatchSampler, "draw", signalled_in_step(step, signal.SIGTERM))
        full_disk_from(patch, full_from)
        assert cli.main(["train", "--config", str(config)]) == 2
    said = capsys.readouterr()
    assert "requeue" not in said.out
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert f"stopped on request after step {step + 1} of 13, but the checkpoint cannot be written" in line
    assert lost in line
    assert cli.main(["train", "--config", str(config), "--resume", "auto"]) == 0
    assert losses_of(tmp_path / "runs" / "run") == losses_of(tmp_path / "runs" / "whole")


def full_disk_from(patch: pytest.MonkeyPatch, step: int, times: int = 0) -> None:
    """No checkpoint of ``step`` or a later one can be written, but for the first ``times`` of them."""
    write = run_checkpoints.write_checkpoint
    tried: list[int] = []

    def sometimes(folder: Path, *arguments: Any) -> None:
        if int(folder.name[-8:]) >= step:
            tried.append(step)
            if len(tried) > times:
                full()
        write(folder, *arguments)

    patch.setattr(run_checkpoints, "write_checkpoint", sometimes)


def test_a_stop_after_a_checkpoint_of_the_same_step_loses_nothing(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"checkpoint_every": 4})
    config = write_config(tmp_path / "config.yaml", tree)
    with monkeypatch.context() as patch:
        patch.setattr(BatchSampler, "draw", signalled_in_step(3, signal.SIGTERM))
        full_disk_from(patch, 4, times=1)
        assert cli.main(["train", "--config", str(config)]) == 0
    assert "requeue: stopped on request after step 4" in capsys.readouterr().out
    assert newest_checkpoint(tmp_path / "runs" / "run" / "checkpoints") is not None


@pytest.mark.parametrize("command", ["train", "score"])
def test_a_pass_without_a_checkpoint_is_not_left(
    tmp_path: Path,
    models_dir: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A pass that is asked to stop ends first; then training loses its state, and scoring alone has its product."""
    tree = run_tree("bert", tmp_path, models_dir, "run", scoring={"shard_size": 16, "refresh": "none"})
    config = write_config(tmp_path / "config.yaml", tree)
    measure = Measurer.measure

    def signalled(self: Measurer[Any], *arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, *arguments, **options)

    monkeypatch.setattr(Measurer, "measure", signalled)
    full_disk_from(monkeypatch, 0)
    assert cli.main([command, "--config", str(config)]) == (2 if command == "train" else 0)
    said = capsys.readouterr()
    assert "requeue" not in said.out
    assert ("as there is no checkpoint, is lost" in said.err) == (command == "train")
    table, _ = ScoreTable.read(tmp_path / "runs" / "run" / "scores")
    assert len(table) == 48


@pytest.mark.parametrize("command", ["train", "score"])
def test_lines_that_are_lost_are_named_however_a_command_ends(
    tmp_path: Path, models_dir: Path, command: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Here by a stop, in the warm-up."""
    config = write_config(tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "run"))
    monkeypatch.setattr(BatchSampler, "draw", signalled_in_step(0, signal.SIGTERM))
    open_ = Path.open

    def sometimes(path: Path, *arguments: Any, **options: Any) -> Any:
        return full() if path.name == "metrics.jsonl" else open_(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", sometimes)
    assert cli.main([command, "--config", str(config)]) == 0
    (said,) = warnings_of(caplog, "are lost")
    assert said == f"{1 if command == 'score' else 2} lines of {tmp_path / 'runs' / 'run' / 'metrics.jsonl'} are lost"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_stop_that_loses_the_state_ends_every_rank(tmp_path: Path, models_dir: Path) -> None:
    """The disk is full for rank 0, and rank 1 is asked to stop."""
    config = write_config(tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "run"))
    script = tmp_path / "full.py"
    script.write_text(
        f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
from tests.disks import full
from tests.steps import signalled_in_step
from tsqlora_scale.commands.train import main
from tsqlora_scale.quality import BatchSampler
from tsqlora_scale.run import run_checkpoints

run_checkpoints.write_checkpoint = full
BatchSampler.draw = signalled_in_step(1, signal.SIGUSR1, rank=1)
sys.exit(main(["--config", {str(config)!r}]))
"""
    )
    done = run_launched("ddp-2", script, [], tmp_path)
    assert done.returncode != 0
    # what each rank leaves for the launcher
    assert done.stdout.count("traceback : error: stopped on request after step 2 of 13, but") == 2, done.stdout
    assert "exitcode  : 2" in done.stdout
    assert "all, as there is no checkpoint, is lost" in done.stdout
    assert "requeue:" not in done.stdout


@pytest.mark.parametrize("where", ["ScoreTable.write", "written_whole"])
def test_scores_that_cannot_be_written(
    tmp_path: Path,
    models_dir: Path,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They are what scoring alone is for; the pass is not done again."""
    config = write_config(tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "run"))
    with monkeypatch.context() as patch:
        patch.setattr(
            f"tsqlora_scale.{'quality' if where == 'ScoreTable.write' else 'report.score_summary'}.{where}", full
        )
        assert cli.main(["score", "--config", str(config)]) == 2
    folder = tmp_path / "runs" / "run" / "scores"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: the scores, {str(folder)!r}, cannot be written (")
    assert "(--resume)" in line
    with monkeypatch.context() as patch:
        patch.setattr(Measurer, "_chunk", full)
        assert cli.main(["score", "--config", str(config), "--resume"]) == 0
    assert len(ScoreTable.read(folder)[0]) == 48
    assert json.loads((folder.parent / "scores.json").read_text())["scored"] == 48


@pytest.mark.parametrize("where", ["mkdir", "rmtree", "unlink", "rmtree of its own"])
def test_a_folder_of_parts_that_cannot_be_made(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The pass stays in memory, whatever lies there."""
    own, other = tmp_path / "parts" / "pass-001", tmp_path / "parts" / "pass-000"
    rows = [
        PassPart(np.arange(i, i + 2), np.full((2, 3), float(i)), np.ones((2, 4), np.float32), 1e-7, 2) for i in (0, 2)
    ]
    if where == "rmtree of its own":
        left = Parts(own)
        left.open({"seed": 0})
        left.append(rows[1])
    elif where == "unlink":
        other.parent.mkdir()
        other.touch()
    elif where == "rmtree":
        other.mkdir(parents=True)
    parts = Parts(own)
    with monkeypatch.context() as patch:
        if where in ("mkdir", "unlink"):
            patch.setattr(Path, where, full)
        else:
            patch.setattr(shutil, "rmtree", full)
        assert parts.open({"seed": 1}) == 0
        for one in rows:
            parts.append(one)
    assert [part.indices.tolist() for part in parts] == [[0, 1], [2, 3]]
    (said,) = warnings_of(caplog, "goes on in memory")
    assert str(own) in said
    assert parts.open({"seed": 1}) == 0
    parts.append(rows[0])
    assert [path.name for path in own.iterdir()] == ["000000.parquet"], "there is room again"


def test_a_proxys_parts_stay_until_a_checkpoint_has_its_scores(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run")
    tree["scoring"] |= {"proxy_model": str(tiny_model("deberta", models_dir)), "refresh": "none"}
    config = write_config(tmp_path / "config.yaml", tree)
    parts = tmp_path / "runs" / "run-proxy" / "score-parts"
    with monkeypatch.context() as patch:
        full_disk_from(patch, 3)
        save = Run.save_checkpoint

        def full_at_first(run: Run) -> bool:
            with monkeypatch.context() as inner:
                if isinstance(run.selector, QualitySelector) and run.step == 0:
                    inner.setattr(run_checkpoints, "write_checkpoint", full)
                return save(run)

        patch.setattr(Run, "save_checkpoint", full_at_first)
        patch.setattr(BatchSampler, "draw", signalled_in_step(4, signal.SIGTERM))
        assert cli.main(["train", "--config", str(config)]) == 2
    assert len(list(parts.glob("*/*.parquet"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(Measurer, "_chunk", full)
        assert cli.main(["train", "--config", str(config), "--resume", "auto"]) == 0
    assert not parts.exists()
    assert len(losses_of(tmp_path / "runs" / "run")) == 13


@pytest.mark.parametrize("where", ["RunRecord.prepare", "the second prepare", "drop_after"])
def test_a_start_that_cannot_be_written(
    tmp_path: Path,
    models_dir: Path,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A new run, one after its proxy, and one that resumes."""
    tree = run_tree("bert", tmp_path, models_dir, "run")
    arguments = ["train", "--config", str(tmp_path / "config.yaml")]
    if where == "drop_after":
        go(tree)
        arguments += ["--resume", "auto"]
    if where == "the second prepare":
        tree["scoring"] |= {"proxy_model": str(tiny_model("deberta", models_dir)), "refresh": "none"}
    write_config(tmp_path / "config.yaml", tree)
    prepare = RunRecord.prepare

    def sometimes(record: RunRecord, config_yaml: str) -> None:
        prepare(record, config_yaml) if record.folder.name == "run-proxy" else full()

    if where == "drop_after":
        monkeypatch.setattr("tsqlora_scale.run.build.drop_after", full)
    else:
        monkeypatch.setattr(RunRecord, "prepare", sometimes)
    assert cli.main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {str(tmp_path / 'runs' / 'run')!r} cannot be written (")
