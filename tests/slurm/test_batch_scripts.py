"""What the batch scripts refuse, and what they start; without a Slurm."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.slurm.queue import ROOT, SCRIPTS
from tsqlora_scale.config.load import load_config
from tsqlora_scale.config.schema import Config

BATCH = sorted(SCRIPTS.glob("*.sbatch"))
SCHEDULE = {
    "scontrol": 'case "$*" in *hostnames*) echo gpu07 ;; *) echo "NodeName=gpu07 NodeAddr=10.0.0.7 Port=1" ;; esac',
    "srun": 'echo "$ENGINE $RENDEZVOUS_HOST:$RENDEZVOUS_PORT $PROCESSES_PER_NODE"; printf "%s\\n" "$@"',
    "squeue": "echo RUNNING",
}
Done = subprocess.CompletedProcess[str]


def run(script: str, *arguments: str, folder: Path, cwd: Path = ROOT, **variables: str) -> Done:
    """A batch script as Slurm would run it, with programs of Slurm that only say what they are asked."""
    for name, text in SCHEDULE.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]"}
    slurm |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "96"}
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=60,
        env=os.environ | slurm | {"PATH": f"{folder}:{os.environ['PATH']}"} | variables,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("nodes.sbatch", "--engine zero9 --config F", ["--engine 'zero9'", "choose from: ddp fsdp2 zero2 zero3"]),
        ("nodes.sbatch", "--config F --engine", ["--engine needs a value"]),
        ("one_node.sbatch", "--config F --overwrite", ["--overwrite", "run.name"]),
        ("one_node.sbatch", "--config F --resume=DIR", ["--resume=DIR", "--resume auto"]),
        ("nodes.sbatch", "--config F --image a.sif", ["--image 'a.sif'", "neither apptainer nor pyxis"]),
        ("container.sbatch", "--config F", ["which container? give --image"]),
        ("compare.sbatch", "--out D", ["--config is missing"]),
        ("compare.sbatch", "--config F --shard=0/2", ["--shard", "leave it out"]),
        ("compare.sbatch", "--config F --resume auto", ["--resume"]),
    ],
)
def test_a_mistake_is_one_line(script: str, arguments: str, words: list[str], tmp_path: Path) -> None:
    done = run(script, *arguments.split(), folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert [word for word in words if word not in done.stderr] == []


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_a_script_has_what_a_requeue_needs(script: Path, tmp_path: Path) -> None:
    lines = script.read_text(encoding="utf-8").splitlines()
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=B:USR1@300"} <= set(lines)
    done = run(script.name, "--config", "F", folder=tmp_path, cwd=tmp_path)  # not the repository's root
    assert done.returncode == 2 and "submit from there" in done.stderr


def trained(done: Done) -> tuple[str, list[str], Config]:
    """How ranks meet, the words of srun's command, and the config that they would train by."""
    assert done.returncode == 0, done.stderr
    meeting, *words = done.stdout.splitlines()
    command = words[words.index("launch/slurm/node.sh") + 1 :]
    assert command[-2:] == ["--resume", "auto"]
    overrides = [word for word in command if re.match(r"\w+\.\w+=", word)]
    return meeting, words, load_config(ROOT / command[command.index("--config") + 1], overrides)


def test_the_example_of_sixteen_gpus(tmp_path: Path) -> None:
    meeting, words, config = trained(run("a100.sbatch", "train.epochs=1", folder=tmp_path))
    assert meeting == "zero3 10.0.0.7:23456 8"
    assert words[:2] == ["--ntasks=2", "--ntasks-per-node=1"]
    assert (config.model.dtype, config.model.quantization, config.train.epochs) == ("bf16", "none", 1)
    assert config.train.batch_size == 16 * (config.train.micro_batch_size or 0)


def test_every_task_of_an_array_is_a_share(tmp_path: Path) -> None:
    arguments = ["--config", "configs/compare/tsqlora_table2.yaml", "--small", "--engine", "zero2"]
    array = {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "4"}
    for task in (1, 4):
        done = run("compare.sbatch", *arguments, folder=tmp_path, SLURM_ARRAY_TASK_ID=str(task), **array)
        assert done.returncode == 0, done.stderr
        words = done.stdout.splitlines()
        command = words[words.index("launch/slurm/node.sh") + 1 :]
        assert words[0].startswith("zero2 ")
        assert command == [*arguments[:3], "--shard", f"{task - 1}/4"]
    done = run("compare.sbatch", *arguments, folder=tmp_path)
    assert "--shard" not in done.stdout
    array["SLURM_ARRAY_TASK_MAX"] = "7"
    done = run("compare.sbatch", *arguments, folder=tmp_path, SLURM_ARRAY_TASK_ID="3", **array)
    assert (done.returncode, "have gaps" in done.stderr) == (2, True)


def test_of_an_array_one_task_goes_back_to_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last task has the number of the array, by which Slurm means all of them."""
    whole = 'case "$*" in *"--jobs 99_4 "*) echo RUNNING ;; *) printf "RUNNING\\nPENDING\\n" ;; esac'
    control = 'case "$1" in requeue) echo "requeue $2" ;; *) ' + SCHEDULE["scontrol"] + " ;; esac"
    for name, text in (("squeue", whole), ("scontrol", control), ("srun", "exit 75")):
        monkeypatch.setitem(SCHEDULE, name, text)
    array = {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "4"}
    arguments = ["--config", "configs/compare/tsqlora_table2.yaml", "--small"]
    numbers = {"SLURM_JOB_ID": "99", "SLURM_ARRAY_JOB_ID": "99", "SLURM_ARRAY_TASK_ID": "4"}
    done = run("compare.sbatch", *arguments, folder=tmp_path, **array, **numbers)
    assert (done.returncode, "requeue 99_4" in done.stdout) == (75, True), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("engine", "gpus", "arguments", "launched"),
    [
        ("ddp", 1, "", ""),
        ("zero3", 1, "", "--config_file configs/accelerate/zero3.yaml --num_processes 1"),
        ("ddp", 4, "", "--config_file configs/accelerate/ddp.yaml --num_processes 4"),
        ("ddp", 4, "--workers 1", "--config_file configs/accelerate/ddp.yaml --num_processes 4"),
        ("ddp", 4, "--workers 4", ""),
        ("ddp", 8, "--workers=4", "--config_file configs/accelerate/ddp.yaml --num_processes 2"),
        ("zero2", 4, "--workers 4", "--config_file configs/accelerate/zero2.yaml --num_processes 1"),
        ("zero2", 4, "--num_processes 2", "--config_file configs/accelerate/zero2.yaml"),
        ("zero2", 1, "--workers 2", "--config_file configs/accelerate/zero2.yaml --num_processes 1"),
    ],
)
def test_runs_of_a_comparison_share_a_nodes_gpus(
    engine: str, gpus: int, arguments: str, launched: str, tmp_path: Path
) -> None:
    (tmp_path / "python").write_text('#!/usr/bin/env bash\necho "$*"\n')
    (tmp_path / "python").chmod(0o755)
    given = ["--config", "F", *arguments.split()]
    slurm = {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURMD_NODENAME": "gpu07", "PROCESSES_PER_NODE": str(gpus)}
    slurm |= {"PROGRAM": "launch/compare.py", "ENGINE": engine, "LEAVE_SECONDS": "9"}
    done = subprocess.run(
        ["bash", "launch/slurm/node.sh", *given], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
        env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["launch/compare.py", *given, *launched.split()]
