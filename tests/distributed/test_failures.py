"""One rank fails, the others do not wait for it, and what the user reads last is why."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, run_launched
from tests.runs import run_tree, write_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

FAILING = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from tests.steps import before_steps
from tsqlora_scale import training
from tsqlora_scale.commands.train import main
from tsqlora_scale.common.errors import UserError

def a_slow_disk():
    time.sleep(10_000)

def hang_between_forward_and_backward():
    from tsqlora_scale.tasks import Task
    Task.loss_sums = lambda *_: a_slow_disk()

def in_step(step, engine):
    if step == 5:
        open(os.environ["PIDS"] + str(engine.world.rank), "w").write(str(os.getpid()))
        if engine.world.rank == 1:
            {how}

training.optimizer_step = before_steps(in_step)
sys.exit(main())
"""

#: how rank 1 ends -> what is read in the launcher's closing words
CAUSES = {
    "raise KeyError('no such shelf')": "KeyError: 'no such shelf'",
    "raise UserError('shelf 3 is empty; fill it')": "error: shelf 3 is empty; fill it",
    "os.kill(os.getpid(), signal.SIGKILL)": "Signal 9 (SIGKILL)",
    "a_slow_disk()": "rank 1 has made no progress",
    # where rank 0 waits in an exchange of the engine's own
    "hang_between_forward_and_backward()": "rank 1 has made no progress",
}


@pytest.mark.parametrize(
    ("engine", "how"), [("ddp-2", how) for how in list(CAUSES)[:4]] + [("zero3-2", how) for how in list(CAUSES)[4:]]
)
def test_the_first_cause_is_said_last(
    tmp_path: Path, models_dir: Path, engine: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIDS", str(tmp_path / "pid-"))
    # collectives give up after half a minute
    config = write_config(
        tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "run", run={"timeout_minutes": 0.5})
    )
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT), how=how))
    done = run_launched(engine, script, ["--config", str(config)], tmp_path)
    assert done.returncode not in (0, None)
    closing = done.stdout[done.stdout.rindex("Root Cause") :]
    assert CAUSES[how] in closing
    assert "rank      : 1 " in closing
    if "no progress" in CAUSES[how]:
        assert "time.sleep" in closing  # where it hangs
    assert not (tmp_path / "runs" / "run" / "result.json").exists()
    for rank in range(2):
        assert is_gone(int((tmp_path / f"pid-{rank}").read_text()))


def is_gone(pid: int) -> bool:
    """Whether a process has ended, or does so within seconds."""
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
