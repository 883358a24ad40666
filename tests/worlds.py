"""Run a function on several ranks: real processes that meet over gloo."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tsqlora_scale.engine.collectives import World

#: The libraries are imported once, not by every rank.
PRELOADED = ["torch", "torch.distributed", "tests.worlds"]


def run_on_ranks(
    function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 120.0, collective_timeout: float = 60.0
) -> list[Any]:
    """What ``function(world, *arguments)`` returns on every one of ``size`` ranks, in rank order.

    Fails with the traceback of a rank that fails, and with all that is known of ranks that hang.

    Args:
        function: of a module, and of what can be pickled.
        timeout: seconds after which the ranks are ended.
        collective_timeout: seconds that a collective waits for a rank.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, function.__module__])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_run, args=(function, rank, size, folder, collective_timeout, arguments), daemon=True
            )
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout)
        hanging = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for process in ranks:
            process.kill()
        failures = [path.read_text() for path in sorted(Path(folder).glob("failed-*"))]
        assert not failures, "\n".join(failures)
        assert not hanging, f"ranks {hanging} hang"
        assert [process.exitcode for process in ranks] == [0] * size
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(size)]


def _run(
    function: Callable[..., Any], rank: int, size: int, folder: str, timeout: float, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), size)  # noqa: PTH118
    wait = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
    try:
        result = function(World.current(), *arguments)
        torch.save(result, Path(folder) / f"result-{rank}")
    except BaseException:
        Path(folder, f"failed-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    dist.destroy_process_group()
