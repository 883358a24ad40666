"""Clocks, memory and waits of a GPU, and the table of what was found."""

from __future__ import annotations

import collections
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch


class Report:
    """Rows of a number of the list in ``benchmarks/gpu.py``, section, what, the figure expected, and the one seen."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.rows: list[dict[str, Any]] = []
        properties = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
        #: What has failed, and why.
        self.failures: dict[str, str] = {}
        self.about: dict[str, Any] = {
            "device": properties.name if properties else "cpu",
            "torch": torch.__version__,
        }

    def add(self, number: int, section: str, what: str, value: float, unit: str = "", *, expected: str = "") -> None:
        """Add and print a row.

        Args:
            number: of the measurement; 0: of none.
            expected: the figure that reckoning gives for an H100, with its unit; nothing where there is none.
        """
        row = {"number": number, "section": section, "what": what, "expected": expected, "value": float(value)}
        self.rows.append(row | {"unit": unit})
        print(f"| {number or ''} | {section} | {what} | {expected} | {value:.4g} {unit} |", flush=True)

    def attempt(self, parts: Sequence[partial[None]], section: str) -> None:
        """Measure one part after another; one that fails says why."""
        for part in parts:
            try:
                part()
            except Exception as error:
                self.note_failure(f"{part.func.__name__} of {section}", error)

    def note_failure(self, what: str, error: Exception) -> None:
        """Print and keep why something could not be measured."""
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        print(f"{what} has failed: {reason}", flush=True)
        self.failures[what] = reason

    def write(self, **more: Any) -> None:
        """All that is known so far."""
        told = {**self.about, **more, "failures": self.failures, "rows": self.rows}
        self._file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def block_ms(step: Callable[[], Any], count: int) -> float:
    """Milliseconds of a call, of ``count`` in a row."""
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    return 1e3 * (time.perf_counter() - start) / count


def in_turns(steps: dict[str, Callable[[], Any]], *, count: int, repeats: int) -> dict[str, float]:
    """Medians of blocks that are timed in turns, after one that is not counted."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            taken = block_ms(step, count if repeat else 2)
            if repeat:
                found[name].append(taken)
    return {name: statistics.median(values) for name, values in found.items()}


def kernel_ms(step: Callable[[], Any], count: int) -> float:
    """Milliseconds in which the GPU computes, by its own clock, in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            step()
        synchronize()
    return float(sum(event.self_device_time_total for event in profile.key_averages())) / 1e3 / count


def peak_gb(work: Callable[[], Any]) -> float:
    """Most that the allocator holds during a call, 1e9 bytes; 0 on a CPU."""
    if not torch.cuda.is_available():
        work()
        return 0.0
    emptied()
    torch.cuda.reset_peak_memory_stats()
    work()
    synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


def held_gb() -> float:
    """What the allocator holds now, 1e9 bytes; 0 on a CPU."""
    emptied()
    return torch.cuda.memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def emptied() -> None:
    """Let go of what nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def waits(step: Callable[[], Any]) -> collections.Counter[str]:
    """Places where the host waits for the GPU in a call; none on a CPU."""
    if not torch.cuda.is_available():
        return collections.Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return collections.Counter(
        f"{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}"
        for w in caught
        if "synchronizing CUDA operation" in str(w.message)
    )
