"""Run a function on several ranks: real processes that meet over gloo."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tsqlora_scale.engine.collectives import World

#: The libraries are imported once, not by every rank.
PRELOADED = ["torch", "torch.distributed", "tests.worlds"]
#: Seconds that the other ranks get to end by themselves after one has failed.
GRACE = 5.0


def run_on_ranks(
    function: Callable[..., Any],
    size: int,
    *arguments: Any,
    threads: int = 1,
    timeout: float = 120.0,
    collective_timeout: float = 60.0,
) -> list[Any]:
    """What ``function(world, *arguments)`` returns on every one of ``size`` ranks, in rank order.

    Args:
        function: of a module, as the arguments and the result one that can be pickled.
        threads: of torch, in every rank.
        timeout: seconds after which the ranks are ended.
        collective_timeout: seconds that a collective waits for a rank.

    Raises:
        AssertionError: a rank failed, ended without a result or was still running; with the tracebacks of those that
            failed, first come first, and where those stood that were running.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, function.__module__])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(
                target=_run, args=(function, rank, size, folder, threads, collective_timeout, arguments), daemon=True
            )
            for rank in range(size)
        ]
        try:
            for process in ranks:
                process.start()
            running = _await(ranks, timeout)
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
        report = _failures(folder, ranks, running)
        assert not report, "\n".join(report)
        return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(size)]


def _run(
    function: Callable[..., Any],
    rank: int,
    size: int,
    folder: Path,
    threads: int,
    timeout: float,
    arguments: tuple[Any, ...],
) -> None:
    with (folder / f"stack-{rank}").open("w") as stack:
        faulthandler.enable(stack)  # a rank that is aborted says where it stands
        try:
            torch.set_num_threads(threads)
            store = dist.FileStore(str(folder / "store"), size)
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout)
            )
            torch.save(function(World.current(), *arguments), folder / f"result-{rank}")
            dist.destroy_process_group()
        except BaseException:
            (folder / f"failed-{rank}").write_text(traceback.format_exc())
            raise


def _await(ranks: list[BaseProcess], timeout: float) -> list[int]:
    """Wait for the ranks; abort those that are still running at the end of the time, and return them."""
    deadline = time.monotonic() + timeout
    one_failed = False
    while alive := [process for process in ranks if process.is_alive()]:
        if not one_failed and any(process.exitcode for process in ranks):
            one_failed = True
            deadline = min(deadline, time.monotonic() + GRACE)
        if (left := deadline - time.monotonic()) <= 0:
            break
        wait([process.sentinel for process in alive], left)
    running = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for rank in running:
        if (pid := ranks[rank].pid) is not None:
            os.kill(pid, signal.SIGABRT)
            ranks[rank].join(GRACE)
    return running


def _failures(folder: Path, ranks: list[BaseProcess], running: list[int]) -> list[str]:
    """What is known of every rank that has not ended well."""
    written = sorted(folder.glob("failed-*"), key=lambda path: path.stat().st_mtime_ns)
    report = [f"rank {path.name.removeprefix('failed-')} failed:\n{path.read_text()}" for path in written]
    for rank, process in enumerate(ranks):
        stack = (folder / f"stack-{rank}").read_text() if (folder / f"stack-{rank}").exists() else ""
        if rank in running:
            report.append(f"rank {rank} was still running:\n{stack}")
        elif process.exitcode and not (folder / f"failed-{rank}").exists():
            report.append(f"rank {rank} ended with exit code {process.exitcode}:\n{stack}")
    return report
