"""Progress of long work, on rank 0 only: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """``with Progress("training", shows=True) as bar: bar(7, 100, "loss 0.3")``.

    Args:
        what: the work.
        shows: whether this process shows it.
        beat: called with every report, on processes that show nothing, too.
    """

    def __init__(self, what: str, *, shows: bool, beat: Callable[[], None] | None = None) -> None:
        self._what = what
        self._shows = shows
        self._beat = beat
        self._bar: Any = None
        self._printed = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Report that ``done`` of ``total`` units are finished."""
        if self._beat is not None:
            self._beat()
        if not self._shows:
            return
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(total=total, desc=self._what, leave=False)
            self._bar.update(done - self._bar.n)
            self._bar.set_postfix_str(note)
            if done == total:
                self._close()
            return
        now = time.monotonic()
        if done == total or now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            print(f"{self._what}: {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
