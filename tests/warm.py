"""Launches without the seconds that every process spends on imports: forks of one that has made them.

A launcher is the real one (``torchrun``, ``accelerate launch``), run in a fork; it starts its ranks by forks, too,
where it would else run Python anew. All else is as it is to a user: sessions, environments, exit codes, signals, and
the words with which the launcher closes.

As a program: the process that is forked. A line of orders comes in, the number of the process and its exit code go out.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
#: What runs import sooner or later.
IMPORTED = (
    "torch.distributed.run", "torch.distributed.fsdp", "accelerate.commands.launch",
    "transformers.models.auto.modeling_auto", "transformers.trainer_utils", "peft", "deepspeed", "bitsandbytes",
    "scipy.stats", "sklearn.metrics", "pyarrow.parquet", "datasets", "rouge_score.rouge_scorer",
    *(f"transformers.models.{kind}" for kind in (
        "bert.modeling_bert", "deberta_v2.modeling_deberta_v2", "bart.modeling_bart", "t5.modeling_t5",
        "llama.modeling_llama", "gpt2.modeling_gpt2",
    )),
    "tsqlora_scale.run.build", "tsqlora_scale.training", "tsqlora_scale.commands.train", "tsqlora_scale.api",
)  # fmt: skip


class Warm:
    """The client's end: one such process, which ends with this one."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=ROOT, env=environment,
        )  # fmt: skip
        atexit.register(self._process.kill)

    def run(
        self, command: Sequence[str], *, timeout: float, ranks: int = 0, environment: Mapping[str, str] | None = None,
        cwd: Path = ROOT, together: bool = False,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run a command in a fork.

        Args:
            command: a script of Python's with its arguments, or ``torchrun`` or ``accelerate launch`` with theirs.
            ranks: that the launcher will start; 0 for a script.
            environment: all of it; none: ours.
            together: errors among the output.

        Raises:
            subprocess.TimeoutExpired: it has been killed.
        """
        with tempfile.NamedTemporaryFile() as output, tempfile.NamedTemporaryFile() as errors:
            order = {
                "command": list(command), "ranks": ranks, "cwd": str(cwd), "output": output.name,
                "environment": dict(os.environ if environment is None else environment),
                "errors": output.name if together else errors.name,
            }  # fmt: skip
            code = self._run(order, timeout)
            said, complained = (file.read().decode(errors="replace") for file in (output, errors))
        if code is None:
            raise subprocess.TimeoutExpired(list(command), timeout, said, complained)
        return subprocess.CompletedProcess(list(command), code, said, complained)

    def _run(self, order: Mapping[str, Any], timeout: float) -> int | None:
        """The exit code; None after too long a time."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        answer = self._process.stdout.readline()
        assert answer, "the warm process has ended: it cannot import what runs need"
        pid = int(answer)
        try:
            if not select.select([self._process.stdout], [], [], timeout)[0]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGABRT)  # it says where it stands
                self._process.stdout.readline()
                return None
            return int(self._process.stdout.readline())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


@functools.cache
def warm() -> Warm:
    """The one of this process."""
    return Warm()


def serve() -> None:
    """Import, then fork as often as a line comes in."""
    from tsqlora_scale.common.quiet import prepare_environment

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    prepare_environment()
    for name in IMPORTED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # or every collection in a child copies all that this process holds
    gc.unfreeze = lambda: None
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            become(json.loads(line))
        print(pid, file=answers)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers)


def become(order: Mapping[str, Any]) -> NoReturn:
    """Be the process of an order, in a session of its own."""
    os.setsid()
    output, errors = (os.open(order[name], os.O_WRONLY | os.O_APPEND) for name in ("output", "errors"))
    nothing = os.open(os.devnull, os.O_RDONLY)
    for there, here in ((nothing, 0), (output, 1), (errors, 2)):
        os.dup2(there, here)
    os.closerange(3, max(nothing, output, errors) + 1)  # what the client reads, among others
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    command = order["command"]
    if not order["ranks"]:
        run_script(command)
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    waiting = fork_ranks(order["ranks"])
    SubprocessHandler._popen = lambda handler, args, env: waiting.pop(0).start(args, env)  # type: ignore[method-assign]
    sys.argv = command
    if Path(command[0]).name == "torchrun":
        from torch.distributed.run import main
    else:
        from accelerate.commands.accelerate_cli import main
    main()
    sys.exit(0)


class WaitingRank:
    """A fork that becomes a rank once it is told which: as :class:`subprocess.Popen`, as far as launchers use it."""

    def __init__(self, others: Sequence[WaitingRank]) -> None:
        reading, self._writing = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            os.close(reading)
            return
        for pipe in [self._writing, *(other._writing for other in others)]:
            os.close(pipe)  # or it would not end where its launcher does
        with os.fdopen(reading, encoding="utf-8") as file:
            told = file.read()
        if not told:
            os._exit(0)
        order = json.loads(told)
        os.setsid()
        os.environ.clear()
        os.environ.update(order["env"])
        run_script(order["args"])

    def start(self, args: Sequence[str], env: Mapping[str, str]) -> WaitingRank:
        """Be ``python -u SCRIPT ...``."""
        assert args[:2] == (sys.executable, "-u"), args
        with os.fdopen(self._writing, "w", encoding="utf-8") as file:
            json.dump({"args": args[2:], "env": dict(env)}, file)
        return self

    def poll(self) -> int | None:
        """The exit code, once it has ended."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Until it ends."""
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("rank", timeout or 0.0)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode


def fork_ranks(count: int) -> list[WaitingRank]:
    """Before a launcher has threads."""
    ranks: list[WaitingRank] = []
    for _ in range(count):
        ranks.append(WaitingRank(ranks))
    return ranks


def run_script(command: Sequence[str]) -> NoReturn:
    """As ``python -u SCRIPT ...`` from here on: what it raises goes to the interpreter, and ends it as ever."""
    if "PYTHONFAULTHANDLER" in os.environ:
        faulthandler.enable(2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    sys.argv = list(command)
    sys.path[0] = str(Path(command[0]).resolve().parent)
    runpy.run_path(command[0], run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    serve()
