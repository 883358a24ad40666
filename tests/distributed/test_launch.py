"""The real command under real launchers: killed and resumed on other engines, and mistakes on every rank."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.distributed.launch import BIN, ROOT, free_port, launch, run_launched
from tests.faults.killer import after, within
from tests.runs import go, losses_of, ranks_of, read_lines, result_of, run_tree, write_config
from tests.tiny import tiny_model
from tsqlora_scale.engine.zero import ZeroEngine
from tsqlora_scale.run.checkpoint import newest_checkpoint
from tsqlora_scale.step import optimizer_step

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

TRAIN = ROOT / "launch" / "train.py"
KILLED = ROOT / "tests" / "faults" / "killed.py"


#: Engine, what kills it: point, crossing, ranks; and the newest checkpoint then, from which the next engine goes on.
#: Checkpoints are written every second step, the first before the first pass; ranks change after 4 and 8. ZeRO-2 dies
#: while it writes, so that FSDP2 goes on from DDP, ZeRO-3 from FSDP2, FSDP2 from ZeRO-3, and DDP from FSDP2.
CHAIN = [
    ("plain", (after(optimizer_step), 3, "0"), 2),
    ("ddp-2", (after(optimizer_step), 3, "1"), 4),
    ("zero2-2", (within(save_file), 2, "0"), 4),
    ("fsdp2-2", (after(optimizer_step), 3, "1"), 6),
    ("zero3-3", (after(ZeroEngine.backward), 3, "0,1,2"), 8),
    ("fsdp2-2", (after(optimizer_step), 3, "0"), 10),
    ("ddp-2", None, 13),
]


#: A life whose processes are all started as a user's are, under accelerate; torchrun's are in the tests below.
COLD = (2,)


def test_one_rank_of_a_launcher_is_a_run_of_one_process(tmp_path: Path, models_dir: Path) -> None:
    """torchrun with one process has a group of one, and DDP about the model."""
    tree = run_tree("bert", tmp_path, models_dir, "alone")
    go(tree)
    tree["run"] = tree["run"] | {"name": "launched"}
    config = write_config(tmp_path / "config.yaml", tree)
    command = [str(BIN / "torchrun"), "--nproc_per_node", "1", "--master_port", str(free_port()), str(TRAIN)]
    subprocess.run([*command, "--config", str(config)], check=True, timeout=200)
    alone, launched = tmp_path / "runs" / "alone", tmp_path / "runs" / "launched"
    assert losses_of(launched) == pytest.approx(losses_of(alone), abs=1e-6)
    assert ranks_of(launched) == ranks_of(alone)


def test_killed_and_resumed_from_engine_to_engine(tmp_path: Path, models_dir: Path) -> None:
    """SIGKILL to one rank or all of them: no engine leaves a process behind, and the next one goes on."""
    train = {"checkpoint_every": 2, "checkpoint_keep": 9, "eval_every": 4}
    tree = run_tree("bert", tmp_path, models_dir, "run", train=train)
    go(tree)
    whole = tmp_path / "whole"
    (tmp_path / "runs" / "run").rename(whole)
    config = write_config(tmp_path / "config.yaml", tree)
    run_dir = tmp_path / "runs" / "run"
    for number, (engine, kill, newest) in enumerate(CHAIN):
        cold = number in COLD
        arguments = ["--config", str(config), *(["--resume", "auto"] if number else [])]
        if kill is None:
            launch(engine, TRAIN, arguments, tmp_path, timeout=300, cold=cold)
        else:
            point, crossing, ranks = kill
            killed = [point.name, str(crossing), ranks, *arguments]
            done = run_launched(engine, KILLED, killed, tmp_path, timeout=300, cold=cold)
            assert done.returncode != 0
            assert "SIGKILL" in done.stdout or done.returncode == -signal.SIGKILL, done.stdout
        assert newest_checkpoint(run_dir / "checkpoints") == run_dir / "checkpoints" / f"step-{newest:08d}", engine
    assert losses_of(run_dir) == pytest.approx(losses_of(whole), abs=1e-5)
    assert ranks_of(run_dir) == ranks_of(whole)
    evaluated = [line["step"] for line in read_lines(run_dir / "metrics.jsonl") if "eval" in line]
    assert evaluated == [0, 4, 8, 12, 13]
    result = result_of(run_dir)
    assert result["metrics"] == pytest.approx(result_of(whole)["metrics"], abs=1e-6)


@pytest.mark.parametrize("override", ["task.text=[texxt]", "train.batch_size=9", "train.lrr=1"])
def test_a_mistake_ends_every_rank(tmp_path: Path, models_dir: Path, override: str) -> None:
    config = write_config(tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "run"))
    done = run_launched("zero2-2", TRAIN, ["--config", str(config), override], tmp_path, timeout=120)
    assert done.returncode != 0
    assert sum(line.startswith("error: ") for line in done.stdout.splitlines()) == 1, done.stdout
    assert "error: " in done.stdout[done.stdout.rindex("Root Cause") :]
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
from tests.steps import signalled_in_step
from tsqlora_scale.commands.train import main
from tsqlora_scale.quality import BatchSampler

if "--resume" not in sys.argv:
    BatchSampler.draw = signalled_in_step(5, signal.SIGUSR1, rank=1)
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher(tmp_path: Path, models_dir: Path, number: signal.Signals) -> None:
    """It is passed on to every rank; the launcher's own exit code is its own affair. Ctrl-C goes to all of them."""
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"max_steps": 20_000})
    config = write_config(tmp_path / "config.yaml", tree)
    command = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port()), str(TRAIN)]
    lines = tmp_path / "runs" / "run" / "metrics.jsonl"
    with subprocess.Popen(
        [*command, "--config", str(config)], stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    ) as process:
        try:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and not (lines.exists() and len(losses_of(lines.parent)) > 20):
                time.sleep(0.2)
            if number == signal.SIGINT:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            said, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert said.count("requeue: ") == 1
    steps = len(losses_of(lines.parent))
    assert 20 < steps < 20_000
    assert (lines.parent / "checkpoints" / f"step-{steps:08d}").is_dir()


@pytest.mark.parametrize("engine", ["zero3-2"])
def test_a_signal_to_one_rank_stops_all(tmp_path: Path, models_dir: Path, engine: str) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run")
    config = write_config(tmp_path / "config.yaml", tree)
    launch(engine, TRAIN, ["--config", str(config), f"run.output_dir={tmp_path / 'whole'}"], tmp_path)
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED.format(root=str(ROOT)))
    said = launch(engine, script, ["--config", str(config)], tmp_path)
    assert said.count("requeue: stopped on request after step 6 of 13") == 1
    run_dir = tmp_path / "runs" / "run"
    assert (run_dir / "checkpoints" / "step-00000006").is_dir()
    launch(engine, script, ["--config", str(config), "--resume", "auto"], tmp_path)
    assert losses_of(run_dir) == losses_of(tmp_path / "whole" / "run")


@pytest.mark.parametrize("engine", ["zero3-2"])
def test_the_best_is_kept_and_patience_ends_every_rank(tmp_path: Path, models_dir: Path, engine: str) -> None:
    """And what the run has left starts another one on the same engine, and is made longer there."""
    train = {"eval_every": 2, "patience": 2, "keep": "best"}
    tree = run_tree("bert", tmp_path, models_dir, "run", train=train)
    del tree["scoring"]
    tree["sampling"] = {"selector": "full"}
    config = write_config(tmp_path / "config.yaml", tree)
    launch(engine, TRAIN, ["--config", str(config)], tmp_path)
    run_dir = tmp_path / "runs" / "run"
    found = result_of(run_dir)
    evaluated = {line["step"]: line["eval"] for line in read_lines(run_dir / "metrics.jsonl") if "eval" in line}
    values = {step: one["accuracy"] for step, one in evaluated.items() if step}
    best = max(values, key=lambda step: (values[step], -step))
    assert (found["kept"]["which"], found["kept"]["step"]) == ("best", best)
    assert found["metrics"] == evaluated[best]
    if found["stopped_early"]:
        assert found["steps"] == best + 4
    ranks = found["kept"]["ranks"]
    arguments = ["--config", str(config), "run.name=next", f"adapter.init_from={run_dir}", "train.patience=null"]
    launch(engine, TRAIN, [*arguments, "train.max_steps=9"], tmp_path)
    launch(engine, TRAIN, [*arguments, "train.max_steps=10", "--resume", "auto"], tmp_path)
    following = result_of(tmp_path / "runs" / "next")
    assert following["ranks_start"] == ranks
    assert following["metrics_before"] == pytest.approx(found["metrics"])
    assert following["lengths"] == [{"step": 9, "before": 9, "after": 10}]
