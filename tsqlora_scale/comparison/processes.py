"""Runs as processes: what starts one, which devices it sees, and how it is asked to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tsqlora_scale.common.code_version import PACKAGE
from tsqlora_scale.common.errors import UserError

#: The trainer beside the package, in a checkout of the repository.
SCRIPT = PACKAGE.parent / "launch" / "train.py"


@dataclass(frozen=True)
class Launch:
    """How runs are started.

    Attributes:
        config_file: of ``accelerate launch``; none: one process, without a launcher.
        num_processes: of a run under it; none: as its file says.
        workers: runs at once.
    """

    config_file: Path | None = None
    num_processes: int | None = None
    workers: int = 1

    def check(self) -> None:
        """Check what can be checked before the first run.

        Raises:
            UserError: naming the option.
        """
        if self.workers < 1:
            raise UserError(f"--workers {self.workers}: must be 1 or more")
        if self.config_file is not None and not self.config_file.is_file():
            raise UserError(f"--config_file {str(self.config_file)!r} does not exist; see configs/accelerate/")
        if self.num_processes is not None and self.config_file is None:
            raise UserError(
                f"--num_processes {self.num_processes} goes with --config_file; without, a run is one process"
            )
        if self.num_processes is not None and self.num_processes < 1:
            raise UserError(f"--num_processes {self.num_processes}: must be 1 or more")

    def check_devices(self) -> None:
        """Check that a run's ranks have a GPU each, where there are any, before runs are started.

        Raises:
            UserError: naming the option.
        """
        own = share_of_devices(devices(), 0, self.workers)
        if own and self.num_processes is not None and self.num_processes > len(own):
            raise UserError(
                f"--num_processes {self.num_processes}: each of {self.workers} workers has {len(own)} of the "
                f"{len(devices())} GPUs; lower --num_processes, or --workers"
            )

    def command(self, arguments: Sequence[str]) -> list[str]:
        """A run's command line."""
        program = [str(SCRIPT)] if SCRIPT.is_file() else ["-m", "tsqlora_scale.commands.main", "train"]
        if self.config_file is None:
            return [sys.executable, *program, *arguments]
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(self.config_file)]
        if self.num_processes is not None:
            launcher += ["--num_processes", str(self.num_processes)]
        return [sys.executable, *launcher, "--main_process_port", str(_free_port()), *program, *arguments]

    def environment(self, worker: int) -> dict[str, str]:
        """The environment of a worker's runs: its share of the threads and of the devices."""
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.workers)))
        if not SCRIPT.is_file() or self.config_file is not None:
            known = environment.get("PYTHONPATH")
            environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), *([known] if known else [])])
        mine = share_of_devices(devices(), worker, self.workers)
        if mine:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        return environment


def devices() -> list[str]:
    """GPUs that may be used, by their names for ``CUDA_VISIBLE_DEVICES``, without asking a driver."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]  # no GPU's name
    found = sorted(int(path.name[6:]) for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())
    return [str(place) for place in range(len(found))]


def share_of_devices(names: Sequence[str], worker: int, workers: int) -> list[str]:
    """A worker's devices: an even part where there are enough, else one that it shares."""
    if not names:
        return []
    each = len(names) // workers
    return list(names[worker * each : (worker + 1) * each]) if each else [names[worker % len(names)]]


class RunProcess:
    """A run that is under way, in a session of its own: a Ctrl-C in the terminal reaches it through us alone."""

    def __init__(self, command: Sequence[str], *, log: Path, environment: dict[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = log.open("wb")
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._file, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            self._file.close()
            raise

    def poll(self) -> int | None:
        """Its exit code, once it has ended."""
        code = self._process.poll()
        if code is not None:
            self._file.close()
        return code

    def ask_to_stop(self, *, launched: bool) -> None:
        """Ask for a checkpoint and an end.

        Args:
            launched: by a launcher, which would end its ranks before they have written one: they are asked themselves.
        """
        asked = children_of(self._process.pid) if launched else [self._process.pid]
        for pid in asked or [self._process.pid]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGUSR1 if asked else signal.SIGTERM)

    def kill(self) -> None:
        """End it and all that it has started, at once."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._file.close()


def children_of(parent: int) -> list[int]:
    """Processes that another one has started and that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (path / "stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()
            if int(fields[1]) == parent and fields[0] != "Z":
                found.append(int(path.name))
    return sorted(found)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
