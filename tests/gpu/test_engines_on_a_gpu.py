"""DeepSpeed's engines with one rank, launched as a user does."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import losses_of, ranks_of, result_of, run_tree, write_config

ROOT = Path(__file__).resolve().parents[2]


def launched(arguments: list[str], config: Path) -> None:
    """One process under ``accelerate launch``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments, "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    command += [str(ROOT / "launch" / "train.py"), "--config", str(config)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_takes_the_same_steps_as_a_plain_run(tmp_path: Path, models_dir: Path, stage: int) -> None:
    """Scores, rank events and all, to rounding, until a decision falls otherwise."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("no DeepSpeed")
    tree = run_tree("bert", tmp_path, models_dir, "plain", train={"micro_batch_size": 12})
    launched([], write_config(tmp_path / "plain.yaml", tree))
    other = tree | {"run": tree["run"] | {"name": "zero"}}
    arguments = ["--use_deepspeed", "--zero_stage", str(stage), *(["--zero3_init_flag", "true"] if stage == 3 else [])]
    launched(arguments, write_config(tmp_path / "zero.yaml", other))
    folders = [tmp_path / "runs" / name for name in ("plain", "zero")]
    assert result_of(folders[1])["engine"] == f"zero{stage}"
    plain, zero = map(losses_of, folders)
    assert len(zero) == 13
    assert zero[:4] == pytest.approx(plain[:4], rel=1e-3)
    assert len(ranks_of(folders[1])) == 2
