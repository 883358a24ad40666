"""Being asked to stop: SIGTERM, and SIGUSR1, by which SLURM says that a job's time is nearly over."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch

from tsqlora_scale.common.errors import Stopped
from tsqlora_scale.engine.collectives import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
#: Seconds in which further signals are the same request: a launcher and the system above it may both send one.
SAME_REQUEST = 5.0


class StopRequest:
    """A context manager: inside it the first of :data:`SIGNALS` asks for a stop, and one that comes
    more than :data:`SAME_REQUEST` seconds later stops at once.

    A signal may reach some ranks only, or all at different steps, so the ranks agree on the step with which they stop.

    Attributes:
        requested: this rank has been asked to.
        agreed: some rank has been asked to, and all know it.
        interrupts_scoring: whether the pass under way may be left in the middle; it is where a checkpoint of this step
            exists, as before the first pass.
    """

    def __init__(self) -> None:
        self.requested = False
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
        elif now - self._since > SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def during_scoring(self, world: World) -> None:
        """Leave a pass that may be left if any rank was asked to. A collective.

        Raises:
            Stopped: on every rank.
        """
        if not self.interrupts_scoring:
            return
        if int(world.max(torch.tensor([int(self.requested)])).item()):
            raise Stopped("stopped on request while scoring the pool")
