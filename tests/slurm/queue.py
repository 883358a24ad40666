"""A Slurm of one test session, and jobs in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "launch" / "slurm"
CLUSTER = Path(__file__).with_name("cluster.sh")
#: Seconds after which a state that does not come is a failure.
LONGEST = 240.0


def lacking() -> str | None:
    """Why there can be no Slurm here."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} not found): apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "node daemons of Slurm need root"


@dataclass(frozen=True)
class Queue:
    """A running cluster.

    Attributes:
        folder: of its files.
        environment: what its commands and jobs need.
    """

    folder: Path
    environment: dict[str, str]

    def ask(self, *command: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> Job:
        """A job by a script of ``launch/slurm/``, cut down to what the cluster has; its output is in the job's file."""
        words = ["--gpus-per-node=1", "--cpus-per-task=1", *options]
        out = self.folder / "job-%j.out"
        with_more = Queue(self.folder, self.environment | environment)
        number = with_more.ask("sbatch", "--parsable", f"--output={out}", *words, str(SCRIPTS / script), *arguments)
        return Job(self, number)


@dataclass(frozen=True)
class Job:
    """One that was submitted."""

    queue: Queue
    number: str

    def said(self) -> str:
        """Its output, of all lives and array tasks."""
        files = [file for file in self.queue.folder.glob("job-*.out") if file.stem == f"job-{self.number}"]
        return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)

    def field(self, name: str) -> str:
        """What ``scontrol show job`` says of it."""
        shown = self.queue.ask("scontrol", "--oneliner", "show", "job", self.number)
        found = re.search(rf"\b{name}=(\S*)", shown)
        assert found, shown
        return found[1]

    def wait_for(self, state: str) -> None:
        """Until it is in a state.

        Raises:
            AssertionError: it ends in another, or does not come there in time.
        """
        self.wait_until(lambda: self.field("JobState") == state, state)

    def wait_until(self, true: Callable[[], bool], what: str) -> None:
        """Until something is true.

        Raises:
            AssertionError: the job ends before, or it is not true in time.
        """
        end = time.monotonic() + LONGEST
        while not true():
            state = self.field("JobState")
            over = state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            if (over and not true()) or time.monotonic() > end:
                raise AssertionError(f"job {self.number} is {state}, not {what}:\n{self.said()[-6000:]}")
            time.sleep(0.5)
