"""The batch scripts on a real Slurm of two nodes: jobs that train together, are interrupted, cancelled, fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.launch import launch
from tests.runs import losses_of, ranks_of, result_of, run_tree, write_config
from tests.slurm.queue import CLUSTER, ROOT, Job, Queue, lacking

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PACED = "sampling.selector=tests.slurm.paced:PacedSelector"
#: torchrun, as far as the scripts see it: it has a child and ends with that child's code.
RANK = """#!/usr/bin/env bash
bash -c '{rank}' &
wait $!
"""
APPTAINER = """#!/bin/sh
echo "$@" >>{notes}
while [ "$1" != bash ]; do shift; done
exec "$@"
"""


@pytest.fixture(scope="module")
def queue() -> Iterator[Queue]:
    reason = lacking()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short, for the sockets in it
    folder.chmod(0o755)
    started = subprocess.run(
        [str(CLUSTER), "start", str(folder / "c")], capture_output=True, text=True, check=False, timeout=90
    )
    if started.returncode != 0:
        pytest.skip(f"no Slurm can be started here: {started.stderr.strip()[-400:]}")
    python = Path(sys.executable).parent
    environment = os.environ | {
        "SLURM_CONF": started.stdout.strip(), "PATH": f"{python}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(python.parent), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    try:
        yield Queue(folder, environment)
    finally:
        subprocess.run([str(CLUSTER), "stop", str(folder / "c")], check=True, timeout=90)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Path:
    """A folder with ``config.yaml``, whose runs are in ``runs/``."""
    folder = tmp_path_factory.mktemp("runs")
    write_config(folder / "config.yaml", run_tree("bert", folder, models_dir, "run"))
    return folder


def steps_of(run_dir: Path) -> int:
    return len(losses_of(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def restarted(job: Job, times: int) -> None:
    job.wait_until(lambda: job.field("Restarts") == str(times), f"requeued {times} times")


def test_two_nodes_train_a_run_that_is_interrupted_twice(queue: Queue, place: Path) -> None:
    """By the signal before the end of its time, and by a job of a higher partition: the result is that of no pause."""
    config = str(place / "config.yaml")
    launch("ddp-2", ROOT / "launch" / "train.py", ["--config", config, PACED, "run.name=whole"], place)
    expected = place / "runs" / "whole"
    run_dir = place / "runs" / "cut"
    job = queue.submit(
        "nodes.sbatch", "--config", config, PACED, "run.name=cut", PACED_LIVES="2", PACED_NODES=str(place)
    )
    job.wait_until(lambda: steps_of(run_dir) >= 2, "at its second step")
    queue.ask("scancel", "--batch", "--signal=USR1", job.number)  # as --signal=B:USR1@300 does
    restarted(job, 1)
    first_stop = steps_of(run_dir)
    assert 2 <= first_stop < 12
    job.wait_until(lambda: steps_of(run_dir) > first_stop, "going on")
    short = ("sbatch", "--parsable", "--partition=high", "--nodes=2", f"--output={queue.folder}/high.out")
    high = Job(queue, queue.ask(*short, "--wrap", "srun true"))
    restarted(job, 2)
    second_stop = steps_of(run_dir)
    assert first_stop < second_stop < 13
    job.wait_for("COMPLETED")
    assert high.field("JobState") == "COMPLETED"

    assert {place.joinpath(f"rank-{rank}").read_text() for rank in (0, 1)} == {"n1", "n2"}
    assert (result_of(run_dir)["engine"], result_of(run_dir)["world_size"]) == ("ddp", 2)
    said = job.said()
    # the last words of a life may be lost with srun; that it was asked and came back is the job's own to say
    assert said.count("requeue: stopped on request after step") in (1, 2)
    assert said.count("requeued; it goes on from the newest checkpoint") == 2
    assert losses_of(run_dir) == losses_of(expected)
    assert ranks_of(run_dir) == ranks_of(expected)
    adapter = "adapter/adapter_model.safetensors"
    assert (run_dir / adapter).read_bytes() == (expected / adapter).read_bytes()


def test_zero_trains_in_a_container_on_two_nodes(queue: Queue, place: Path) -> None:
    """By an apptainer of the test's own, which only notes what it is asked for."""
    programs = place / "programs"
    programs.mkdir()
    program = programs / "apptainer"
    program.write_text(APPTAINER.format(notes=place / "containers"))
    program.chmod(0o755)
    job = queue.submit(
        "container.sbatch", "--image", "image.sif", "--engine=zero2", "--config", str(place / "config.yaml"),
        "run.name=zero2", "train.max_steps=6",
        options=("--nodes=2",), PATH=f"{programs}:{queue.environment['PATH']}",
    )  # fmt: skip
    job.wait_for("COMPLETED")
    result = result_of(place / "runs" / "zero2")
    assert (result["engine"], result["world_size"]) == ("zero2", 2)
    asked = f"exec --nv --bind {ROOT} --pwd {ROOT} image.sif bash launch/slurm/node.sh --config"
    assert [line.startswith(asked) for line in (place / "containers").read_text().splitlines()] == [True, True]


def test_an_array_makes_the_runs_of_a_comparison(queue: Queue, place: Path) -> None:
    comparison = {
        "tasks": {"words": {"config": str(place / "config.yaml")}},
        "arms": {"tsqlora": {}, "lora": {"adapter.method": "lora", "adapter.r": 2}},
        "seeds": [3],
        "budget": {"steps": 6},
    }
    (place / "comparison.yaml").write_text(yaml.safe_dump(comparison, sort_keys=False), encoding="utf-8")
    arguments = ["--config", str(place / "comparison.yaml"), "--out", str(place / "table")]
    array = queue.submit("compare.sbatch", *arguments, options=("--array=0-1",))
    for task in (0, 1):
        Job(queue, f"{array.number}_{task}").wait_for("COMPLETED")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "compare.py"), *arguments, "--tables-only"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=100,
    )  # fmt: skip
    rows = [line.split(" |")[0] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows == ["| method", "| tsqlora", "| lora"]
    folder = place / "table" / "runs" / "words"
    lora, tsqlora = (result_of(folder / name / "seed3")["trainable_parameters"] for name in ("lora", "tsqlora"))
    assert lora < tsqlora


def test_a_failure_is_one(queue: Queue, place: Path) -> None:
    launcher(place / "fails", "exit 3")
    job = queue.submit("nodes.sbatch", "--config", "any.yaml", PATH=f"{place / 'fails'}:{queue.environment['PATH']}")
    job.wait_for("FAILED")
    assert (job.field("ExitCode"), job.field("Restarts")) == ("3:0", "0")


@pytest.mark.parametrize(
    ("rank", "line"),
    [
        ('trap "exit 0" USR1; while :; do sleep 0.2; done', "requeued; it goes on"),
        ('trap "" USR1; while :; do sleep 0.2; done', "has not ended 2 s after it was asked to"),
    ],
    ids=["ends", "does not end"],
)
def test_a_job_that_is_asked_to_stop_comes_back_unless_it_is_cancelled(
    queue: Queue, place: Path, rank: str, line: str
) -> None:
    launcher(place / "stub", rank)
    environment: dict[str, Any] = {"PATH": f"{place / 'stub'}:{queue.environment['PATH']}", "LEAVE_SECONDS": "2"}
    job = queue.submit("nodes.sbatch", "--config", "any.yaml", **environment)
    job.wait_until(lambda: (place / "stub" / "started").exists(), "started")
    queue.ask("scancel", "--batch", "--signal=USR1", job.number)
    restarted(job, 1)
    assert line in job.said()
    queue.ask("scancel", job.number)  # while it waits for its next life
    job.wait_for("CANCELLED")
    assert job.field("Restarts") == "1"


def launcher(folder: Path, rank: str) -> None:
    """A torchrun whose one rank is this bash program."""
    folder.mkdir(exist_ok=True)
    program = folder / "torchrun"
    program.write_text(RANK.format(rank=f"touch {folder}/started; {rank}"))
    program.chmod(0o755)
    (folder / "started").unlink(missing_ok=True)
