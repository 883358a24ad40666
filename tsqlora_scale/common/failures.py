"""Ranks that fail: the first cause is what the user reads last, and no rank waits for one that is gone."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType, TracebackType

from tsqlora_scale.common.launcher import launched_rank, launched_size

#: Seconds for which a rank stays whose end says less than another's, so that a launcher sees the other's end first.
STAYS = 5.0
#: Share of the time-out of collectives after which a rank that should be at work counts as hanging.
BEFORE_TIMEOUT = 0.9
#: What a collective over gloo says when a peer is gone or late.
LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
#: Code in which a rank waits for others, whatever it has called,
COLLECTIVES = "/torch/distributed/"
#: and such in which it does where it has called nothing of Python: inside are the collectives of DDP and ZeRO-3.
BELOW_PYTHON = ("/torch/autograd/", "/torch/nn/parallel/distributed.py", "/deepspeed/utils/nvtx.py", "/deepspeed/comm/")


def record_cause(message: str, detail: str) -> None:
    """Tell a launcher of the torchrun family why this process fails; it closes with the earliest of these.

    Args:
        message: one line.
        detail: what stands under ``traceback`` in its summary.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        extra = {"py_callstack": detail, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):  # a full disk must not keep this process from ending
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")


def lost_another(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or does not come."""
    import torch.distributed as dist

    if isinstance(error, (dist.DistNetworkError, dist.DistBackendError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)


def fail(error: Exception) -> None:
    """End this process, one of several, after an error that no user can mend. Does not return.

    A rank that fails on its own says why at once. One that has only lost another waits for the launcher to see that
    one's end first, and to end this one.
    """
    rank = launched_rank()
    if lost_another(error):
        reason = str(error).strip().splitlines()[0]
        print(f"rank {rank}: a collective has failed, another rank is gone or hangs ({reason})", file=sys.stderr)
        let_others_speak()
        record_cause(f"lost another rank: {reason}", traceback.format_exc())
    else:
        print(f"rank {rank} has failed:\n{traceback.format_exc()}", file=sys.stderr)
        record_cause(f"{type(error).__name__}: {error}", traceback.format_exc())
    leave(1)


def let_others_speak() -> None:
    """Wait a little: a launcher ends all processes with the first, and another one has something to print."""
    sys.stderr.flush()
    time.sleep(STAYS)


def leave(code: int) -> None:
    """Leave without waiting for threads or for process groups, whose other members may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_group(code: int) -> None:
    """End this process if it has joined others; return if it is alone.

    After an error nothing is taken down: that waits for the other ranks, and they may be inside a collective.

    A gloo group must not be taken down in the ordinary way: DDP holds it until Python frees its reducer, and frees it
    under the interpreter's lock, which the group's thread may be waiting for: the process never ends (torch 2.13;
    one launch in a hundred).
    """
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        if code == 0 and dist.get_backend() == "nccl":
            dist.destroy_process_group()
        leave(code)


class Watchdog:
    """Ends a rank that hangs, and says where, a little before the others' collectives give it up.

    ``with Watchdog(minutes=10, acts=True) as dog:``, then :meth:`beat` after every piece of work. A rank that waits for
    others is left alone: its own collective gives up in time.

    Args:
        minutes: time-out of collectives.
        acts: whether to end the process; otherwise only say where it stands. On a GPU a rank that waits looks like
            one at work.
    """

    def __init__(self, *, minutes: float, acts: bool) -> None:
        self._limit = BEFORE_TIMEOUT * 60 * minutes
        self._acts = acts
        self._last = time.monotonic()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        self.beat()
        if launched_size() > 1 and self._thread is None:
            self._end.clear()
            main = threading.get_ident()
            self._thread = threading.Thread(target=self._watch, args=(main,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def beat(self) -> None:
        """This rank is at work."""
        self._last = time.monotonic()

    def _watch(self, main: int) -> None:
        while not self._end.wait(min(self._limit / 10, 10.0)):
            frame = sys._current_frames().get(main)
            if time.monotonic() - self._last < self._limit or frame is None or (self._acts and waits(frame)):
                continue
            stack = "".join(traceback.format_stack(frame))
            message = f"rank {launched_rank()} has made no progress for {self._limit / 60:.3g} minutes"
            print(f"{message}; it is here:\n{stack}", file=sys.stderr, flush=True)
            if self._acts:
                record_cause(message, f"{message}; it is here:\n{stack}")
                leave(1)
            self.beat()


def waits(frame: FrameType | None) -> bool:
    """Whether a stack, from its innermost frame on, stands in a collective."""
    place = "" if frame is None else Path(frame.f_code.co_filename).as_posix()
    if any(part in place for part in BELOW_PYTHON):
        return True
    while frame is not None:
        if COLLECTIVES in Path(frame.f_code.co_filename).as_posix():
            return True
        frame = frame.f_back
    return False
