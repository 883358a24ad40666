"""The real command under real launchers: resuming on another engine, and mistakes on every rank."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed.launch import BIN, ROOT, free_port, launch, run_launched
from tests.runs import losses_of, ranks_of, result_of, run_tree, write_config
from tests.tiny import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

TRAIN = ROOT / "launch" / "train.py"


def test_resume_on_another_engine(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"checkpoint_every": 6, "checkpoint_keep": 3})
    config = write_config(tmp_path / "config.yaml", tree)
    whole, interrupted = tmp_path / "whole" / "run", tmp_path / "interrupted" / "run"
    launch("plain", TRAIN, ["--config", str(config), f"run.output_dir={whole.parent}"], tmp_path)
    launch("zero2-2", TRAIN, ["--config", str(config), f"run.output_dir={interrupted.parent}"], tmp_path)
    for checkpoint in (interrupted / "checkpoints").iterdir():
        if checkpoint.name != "step-00000006":  # after scoring and one rank event, before the next
            shutil.rmtree(checkpoint)
    assert (interrupted / "checkpoints" / "step-00000006").is_dir()
    for engine in ("plain", "zero3-2"):
        continued = tmp_path / engine / "run"
        shutil.copytree(interrupted, continued)
        arguments = ["--config", str(config), f"run.output_dir={continued.parent}", "--resume", "auto"]
        launch(engine, TRAIN, arguments, tmp_path)
        assert losses_of(continued) == pytest.approx(losses_of(whole), abs=1e-5)
        assert ranks_of(continued) == ranks_of(whole)
        assert result_of(continued)["engine"] == ("plain" if engine == "plain" else "zero3")


@pytest.mark.parametrize("override", ["task.text=[texxt]", "train.batch_size=9", "train.lrr=1"])
def test_a_mistake_ends_every_rank(tmp_path: Path, models_dir: Path, override: str) -> None:
    config = write_config(tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "run"))
    done = run_launched("zero2-2", TRAIN, ["--config", str(config), override], tmp_path, timeout=120)
    assert done.returncode != 0
    assert done.stdout.count("error: ") == 1, done.stdout
    assert "tsqlora_scale/" not in done.stdout, "a traceback of ours"
    assert "exitcode  : 2" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_proxy_on_every_engine(tmp_path: Path, models_dir: Path) -> None:
    """Two models, one after the other, in the same processes."""
    tree = run_tree("bert", tmp_path, models_dir, "run")
    tree["scoring"] |= {"proxy_model": str(tiny_model("deberta", models_dir)), "refresh": "none"}
    config = write_config(tmp_path / "config.yaml", tree)
    runs = {}
    for engine in ("plain", "ddp-2", "zero2-2", "zero3-2"):
        launch(engine, TRAIN, ["--config", str(config), f"run.output_dir={tmp_path / engine}"], tmp_path)
        runs[engine] = tmp_path / engine / "run"
        assert result_of(runs[engine])["engine"] == engine.split("-")[0]
        assert losses_of(runs[engine]) == pytest.approx(losses_of(runs["plain"]), abs=1e-5)
        assert ranks_of(runs[engine]) == ranks_of(runs["plain"])


SIGNALLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from tsqlora_scale import cli, train as loop

original = loop.train_step

def train_step(run):
    if run.step == 5 and run.engine.world.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return original(run)

if "--resume" not in sys.argv:
    loop.train_step = train_step
sys.exit(cli.train())
"""


def test_a_signal_to_the_launcher(tmp_path: Path, models_dir: Path) -> None:
    """It is passed on to every rank; the launcher's own exit code is its own affair."""
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"max_steps": 20_000})
    config = write_config(tmp_path / "config.yaml", tree)
    command = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port()), str(TRAIN)]
    lines = tmp_path / "runs" / "run" / "metrics.jsonl"
    with subprocess.Popen([*command, "--config", str(config)], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and not (lines.exists() and len(losses_of(lines.parent)) > 20):
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert said.count("requeue: ") == 1
    steps = len(losses_of(lines.parent))
    assert 20 < steps < 20_000
    assert (lines.parent / "checkpoints" / f"step-{steps:08d}").is_dir()


@pytest.mark.parametrize("engine", ["ddp-2", "zero3-2"])
def test_a_signal_to_one_rank_stops_all(tmp_path: Path, models_dir: Path, engine: str) -> None:
    config = write_config(tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "run"))
    launch(engine, TRAIN, ["--config", str(config), f"run.output_dir={tmp_path / 'whole'}"], tmp_path)
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED.format(root=str(ROOT)))
    said = launch(engine, script, ["--config", str(config)], tmp_path)
    assert said.count("requeue: stopped on request after step 6 of 13") == 1
    run_dir = tmp_path / "runs" / "run"
    assert (run_dir / "checkpoints" / "step-00000006").is_dir()
    launch(engine, script, ["--config", str(config), "--resume", "auto"], tmp_path)
    assert losses_of(run_dir) == losses_of(tmp_path / "whole" / "run")
