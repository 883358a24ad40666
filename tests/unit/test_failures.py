import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tsqlora_scale.common.failures import Watchdog, lost_another, record_cause, waits


def test_what_counts_as_having_lost_another_rank() -> None:
    gone = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"
    assert lost_another(RuntimeError(gone))
    assert lost_another(torch.distributed.DistBackendError("NCCL error"))
    assert not lost_another(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lost_another(KeyError("Connection closed by peer"))


def test_the_cause_is_written_in_the_launchers_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.api import ProcessFailure

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    before = int(time.time())
    record_cause("no shelf", "here it stands")
    failure = ProcessFailure(local_rank=1, pid=4711, exitcode=1, error_file=str(file))
    assert failure.message["message"] == "no shelf"
    assert before <= failure.timestamp <= int(time.time())
    assert json.loads(file.read_text())["message"]["extraInfo"]["py_callstack"] == "here it stands"


def stands_in(file: str, report: Callable[[], bool]) -> bool:
    """What ``report`` returns, called by code of that file."""
    namespace: dict = {}
    exec(compile("def call(report): return report()\n", file, "exec"), namespace)
    return namespace["call"](report)


@pytest.mark.parametrize(
    ("file", "innermost", "called"),
    [
        ("lib/torch/distributed/distributed_c10d.py", True, True),
        ("lib/torch/autograd/graph.py", True, False),
        ("lib/deepspeed/utils/nvtx.py", True, False),
        ("lib/torch/nn/parallel/distributed.py", True, False),
        ("lib/torch/nn/modules/module.py", False, False),
    ],
)
def test_a_stack_in_a_collective_waits(file: str, innermost: bool, called: bool) -> None:
    """A rank that stands in a function of ours does not, even if a backward pass has called it."""
    assert stands_in(file, lambda: waits(sys._getframe(1))) == innermost
    assert stands_in(file, lambda: waits(sys._getframe())) == called


def test_a_full_disk_does_not_keep_a_process_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/dev/full")
    record_cause("no shelf", "here it stands")


HANGING = """
import sys, time
from tsqlora_scale.common.failures import Watchdog
with Watchdog(minutes=0.02, acts=True) as dog:
    for _ in range(30):
        time.sleep(0.1)
        dog.beat()
    print("has worked", flush=True)
    {end}
print("the end")
"""


@pytest.mark.parametrize(("end", "code"), [("time.sleep(100)", 1), ("pass", 0)])
def test_a_rank_that_hangs_ends_and_one_at_work_does_not(tmp_path: Path, end: str, code: int) -> None:
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "cause")}
    done = subprocess.run(
        [sys.executable, "-c", HANGING.format(end=end)], capture_output=True, text=True, env=environment, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith("has worked")
    if code:
        assert "rank 1 has made no progress for 0.018 minutes; it is here:" in done.stderr
        assert "made no progress" in (tmp_path / "cause").read_text()
    else:
        assert done.stdout.endswith("the end\n")


def test_alone_nobody_watches() -> None:
    with Watchdog(minutes=10, acts=True):
        assert all(thread.name != "watchdog" for thread in threading.enumerate())


def test_a_process_of_a_group_leaves_at_once() -> None:
    source = """
import threading, torch.distributed as dist
from tsqlora_scale.common.failures import leave_group
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
threading.Thread(target=threading.Event().wait).start()  # an ordinary exit would wait for it for ever
print("to be seen")
leave_group(3)
print("not to be seen")
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (3, "to be seen\n")
