"""Being asked to stop: SIGTERM, SIGUSR1, by which SLURM says that a job's time is nearly over, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch

from tsqlora_scale.common.errors import Stopped
from tsqlora_scale.common.launcher import launched, launched_rank
from tsqlora_scale.engine.collectives import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
#: Seconds in which further signals are the same request: a launcher and the system above it may both send one.
SAME_REQUEST = 5.0
#: The same of one Ctrl-C, which a launcher of the torchrun family passes on at once to processes that the terminal has
#: sent it to already; and without a launcher, where it is one signal.
SAME_KEY, SAME_KEY_ALONE = 1.0, 0.1
HEARD = b"stopping after this step, with a checkpoint; Ctrl-C again ends at once\n"


class StopRequest:
    """A context manager: inside it the first of :data:`SIGNALS` asks for a stop, and one that comes
    more than :data:`SAME_REQUEST` seconds later, or a second Ctrl-C, stops at once.

    A signal may reach some ranks only, or all at different steps, so the ranks agree on the step with which they stop.

    Attributes:
        requested: this rank has been asked to.
        interrupted: by Ctrl-C.
        agreed: some rank has been asked to, and all know it.
        interrupts_scoring: whether the pass under way may be left in the middle; it is where a checkpoint of this step
            exists, as before the first pass.
    """

    def __init__(self) -> None:
        self.requested = False
        self.interrupted = False
        self._since = 0.0
        self.agreed = False
        self.interrupts_scoring = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = True, now
            self.interrupted = number == signal.SIGINT
            if self.interrupted and launched_rank() == 0:
                os.write(2, HEARD)  # print is not safe here: the signal may have come in the middle of another
        elif now - self._since > (self._same_key() if number == signal.SIGINT else SAME_REQUEST):
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _same_key(self) -> float:
        return SAME_KEY if launched() else SAME_KEY_ALONE

    def stopped(self, message: str, world: World) -> Stopped:
        """The end of a run that all ranks have agreed to stop, the same on every rank. A collective."""
        interrupted = int(world.max(torch.tensor([int(self.interrupted)])).item())
        return Stopped(message, interrupted=bool(interrupted))

    def during_scoring(self, world: World) -> None:
        """Leave a pass that may be left if any rank was asked to. A collective.

        Raises:
            Stopped: on every rank.
        """
        if not self.interrupts_scoring:
            return
        if int(world.max(torch.tensor([int(self.requested)])).item()):
            raise self.stopped("stopped on request while scoring the pool", world)
