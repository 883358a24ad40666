"""How much memory each phase of a run needs at most."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class PeakMemory:
    """The most that a GPU's allocator has held, by phase. Phases may lie inside one another: a peak is that of all.

    What CUDA itself and NCCL take comes on top. Of a CPU there is one peak, that of the process.

    Args:
        device: whose memory; none, or a CPU, has no phases.
        measured: the peak since the last call of ``reset``, and ``reset``; none: those of the device.

    Attributes:
        bytes: by phase.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        *,
        measured: tuple[Callable[[], int], Callable[[], None]] | None = None,
    ) -> None:
        self.bytes: dict[str, int] = {}
        if measured is None and device is not None and device.type == "cuda":
            measured = (lambda: _allocated_peak(device), lambda: torch.cuda.reset_peak_memory_stats(device))
        self._measured = measured
        #: The peak so far of every phase that has begun and not ended, the outermost first; the first is of none.
        self._open = [0]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase begins and ends; of one that comes several times the highest peak counts."""
        if self._measured is None:
            yield
            return
        self._fold()
        self._open.append(0)
        try:
            yield
        finally:
            self._fold()
            peak = self._open.pop()
            self._open[-1] = max(self._open[-1], peak)
            self.bytes[name] = max(self.bytes.get(name, 0), peak)

    @property
    def highest(self) -> int:
        """The highest peak of all: of a GPU what its allocator has held, else the process's resident memory; bytes."""
        if self._measured is not None:
            self._fold()
            return max(*self._open, *self.bytes.values(), 0)
        return _resident_peak()

    def _fold(self) -> None:
        """What has been needed since the last time belongs to the innermost phase."""
        assert self._measured is not None
        peak, reset = self._measured
        self._open[-1] = max(self._open[-1], peak())
        reset()


def _resident_peak() -> int:
    """The most resident memory of this process, bytes: Linux's own count where it is there, as ``getrusage``'s begins
    with that of the process that this one was forked from."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _allocated_peak(device: torch.device) -> int:
    """Peak of allocated bytes: without the flat dictionary that ``max_memory_allocated`` makes, 0.1 ms a call."""
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    return int(stats["allocated_bytes"]["all"]["peak"]) if stats else 0
