"""Several runs at once, until none is left, and what is shown meanwhile."""

from __future__ import annotations

import signal
import sys
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

from tsqlora_scale.common.errors import Stopped, UserError
from tsqlora_scale.common.files import WRITE_ERRORS
from tsqlora_scale.comparison.processes import Launch, RunProcess
from tsqlora_scale.comparison.trial_outcome import forget_failure, note_failure, tidy
from tsqlora_scale.comparison.trial_queue import TrialQueue
from tsqlora_scale.comparison.trials import Trial
from tsqlora_scale.report.progress import Progress

#: Seconds between two looks at the runs under way.
LOOK = 0.2
#: Seconds that runs have to write a checkpoint after they were asked to stop; fewer than launch/slurm/ leaves us.
PATIENCE = 200.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass
class _Worker:
    number: int
    trial: Trial | None = None
    process: RunProcess | None = None
    since: float = 0.0


class Crew:
    """The workers of a comparison.

    Args:
        queue: what there is to do.
        launch: how runs are started.
    """

    def __init__(self, queue: TrialQueue, launch: Launch) -> None:
        self._queue, self._launch = queue, launch
        self._workers = [_Worker(number) for number in range(launch.workers)]
        self._asked: list[int] = []
        self._asked_at = 0.0
        self._total = queue.most()
        self._done = sum(queue.is_finished(trial) for trial in queue.known())

    def run(self) -> None:
        """Until nothing is left that can be run.

        Raises:
            Stopped: SIGTERM, SIGUSR1 or Ctrl-C has come; runs under way have been asked for a checkpoint.
            UserError: a run's log cannot be written.
        """
        self._queue.failed.clear()
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        try:
            with Progress("comparison", shows=sys.stderr.isatty()) as bar:
                self._work(bar)
        finally:
            for worker in self._workers:
                if worker.process is not None:
                    worker.process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._asked and self._done < self._total:
            raise Stopped(
                f"stopped on request, {self._done} of {self._total} runs are finished",
                interrupted=self._asked[0] == signal.SIGINT,
            )

    def _work(self, bar: Progress) -> None:
        self._give_out(bar)
        told = False
        while any(worker.trial is not None for worker in self._workers):
            time.sleep(LOOK)
            ended = [worker for worker in self._workers if self._has_ended(worker)]
            if self._asked:
                if not told:
                    self._stop_all()
                    told = True
                if time.monotonic() - self._asked_at > PATIENCE or len(self._asked) > 1:
                    return
            elif ended:
                self._give_out(bar)

    def _give_out(self, bar: Progress) -> None:
        """Begin runs on all workers that are free."""
        for worker in self._workers:
            if worker.trial is not None or self._asked:
                continue
            trial = self._queue.next()
            if trial is None:
                break
            log = self._queue.trials.log(trial)
            command = self._launch.command(self._queue.trials.command(trial))
            try:
                forget_failure(log)
                worker.process = RunProcess(command, log=log, environment=self._launch.environment(worker.number))
            except WRITE_ERRORS as error:
                raise UserError(f"{log}: cannot be written ({error}); make room, or give another --out") from None
            worker.trial, worker.since = trial, time.monotonic()
            self._queue.running.add(trial)
        self._show(bar)

    def _has_ended(self, worker: _Worker) -> bool:
        """Whether a worker's run is over; what has become of it is noted then."""
        if worker.process is None or worker.trial is None:
            return False
        code = worker.process.poll()
        if code is None:
            return False
        trial, worker.trial, worker.process = worker.trial, None, None
        self._queue.running.discard(trial)
        seconds = time.monotonic() - worker.since
        if self._queue.is_finished(trial):
            self._done += 1
            if not self._queue.trials.comparison.keep_checkpoints:
                tidy(self._queue.trials.folder(trial))
            self._say(f"{trial}: {_summary(self._queue.outcome(trial).result or {})}, {seconds:.0f} s")
        elif self._asked:  # also one that had no handler of signals yet
            self._say(f"{trial}: stopped, and goes on from its checkpoint")
        else:
            log = self._queue.trials.log(trial)
            self._queue.failed[trial] = note_failure(log, code)
            self._say(f"{trial}: FAILED, {self._queue.failed[trial]} ({log})")
        return True

    def _show(self, bar: Progress) -> None:
        names = [str(worker.trial) for worker in self._workers if worker.trial is not None]
        bar(self._done, self._total, "; ".join(names))

    def _say(self, line: str) -> None:
        """A line above the bar, or in the log."""
        text = f"[{self._done}/{self._total}] {line}"
        if sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _stop_all(self) -> None:
        for worker in self._workers:
            if worker.process is not None:
                worker.process.ask_to_stop(launched=self._launch.config_file is not None)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self._asked.append(number)
        self._asked_at = self._asked_at or time.monotonic()


def _summary(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in list(result.get("metrics", {}).items())[:3])
