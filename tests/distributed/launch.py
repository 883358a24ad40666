"""Start real processes under real launchers, warm (see warm.py) or the way a user does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from tests.warm import warm

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")

#: Seconds after which a launch counts as hanging; less than a test may take.
LONGEST = 500.0
#: name -> (processes, ZeRO stage, "fsdp2" or None, what result.json must say the engine was)
ENGINES: dict[str, tuple[int, int | str | None, str]] = {
    "plain": (1, None, "NO"),
    "ddp-2": (2, None, "MULTI_CPU"),
    "zero2-2": (2, 2, "DEEPSPEED"),
    "zero3-2": (2, 3, "DEEPSPEED"),
    "zero3-3": (3, 3, "DEEPSPEED"),
    "fsdp2-2": (2, "fsdp2", "FSDP"),
    "fsdp2-3": (3, "fsdp2", "FSDP"),
}


def launch(
    engine: str, script: Path, arguments: list[str], folder: Path, timeout: float = LONGEST, *,
    persistence: int = 0, cold: bool = False,
) -> str:  # fmt: skip
    """Run a script under an engine; its output. Fails the test with that output if it exits with an error."""
    done = run_launched(engine, script, arguments, folder, timeout, persistence=persistence, cold=cold)
    assert done.returncode == 0, f"{engine} exited with {done.returncode}:\n{done.stdout[-12000:]}"
    return done.stdout


def run_launched(
    engine: str, script: Path, arguments: list[str], folder: Path, timeout: float = LONGEST, *,
    persistence: int = 0, cold: bool = False,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run a script under an engine, output and errors together.

    Args:
        persistence: of how many elements ZeRO-3 and FSDP2 leave a parameter whole on every rank; 0: even a tiny
            model's weights are really partitioned.
        cold: start Python anew for every process, as a user's launcher does.
    """
    processes, stage, _ = ENGINES[engine]
    port = str(free_port())
    if stage == "fsdp2":
        settings = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text(encoding="utf-8"))
        settings["fsdp_config"]["fsdp_min_num_params"] = persistence
        config = folder / "fsdp2.yaml"
        config.write_text(yaml.safe_dump(settings | {"num_processes": processes}), encoding="utf-8")
        command = [str(BIN / "accelerate"), "launch", "--config_file", str(config), "--main_process_port", port]
    elif stage is not None:
        zero: dict[str, object] = {"stage": stage}
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = persistence
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        config = folder / f"deepspeed-{stage}.json"
        config.write_text(json.dumps({"zero_optimization": zero, **dict.fromkeys(sizes, "auto")}))
        command = [str(BIN / "accelerate"), "launch", "--use_deepspeed", "--deepspeed_config_file", str(config)]
        command += ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", "--main_process_port", port]
    elif processes > 1:
        command = [str(BIN / "torchrun"), "--nproc_per_node", str(processes), "--master_port", port]
    else:
        command = [sys.executable]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    environment["PYTHONFAULTHANDLER"] = "1"
    whole = [*command, str(script), *arguments]
    return (_run_cold if cold else _run_warm)(engine, whole, environment, timeout)


def _run_warm(
    engine: str, command: Sequence[str], environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    ranks = 0 if command[0] == sys.executable else ENGINES[engine][0]
    try:
        return warm().run(
            command if ranks else command[1:], ranks=ranks, environment=environment, timeout=timeout, together=True
        )
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{engine} hangs:\n{str(error.stdout)[-12_000:]}") from None


def _run_cold(
    engine: str, command: Sequence[str], environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True,
        env=environment,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)  # every process says where it stands
            said, _ = process.communicate(timeout=30)
            raise AssertionError(f"{engine} hangs:\n{said[-12_000:]}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, said)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
