#!/usr/bin/env python3
"""Weighted draws from large pools: set-up time, memory and draws per second, and what a larger pool would take.

    python benchmarks/sampler.py --out DIR --sizes 1e6,1e7,1e8

Weights are written chunk by chunk and memory-mapped, the classes too; resident memory is that of this process without
the pages of mapped files. Every size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tsqlora_scale.common.random_streams import philox
from tsqlora_scale.quality.draws.dyadic import DyadicClasses

CHUNK = 10**6


def anonymous_bytes() -> int:
    """Resident memory that belongs to no file (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("needs Linux: /proc/self/status without RssAnon")


def measure(folder: Path, size: int, batch: int, seconds: float) -> dict[str, float]:
    """Times and memory for one pool."""
    weights = np.lib.format.open_memmap(folder / "weights.npy", mode="w+", dtype=np.float64, shape=(size,))
    for number, start in enumerate(range(0, size, CHUNK)):
        part = weights[start : start + CHUNK]
        part[:] = np.exp(1.4 * philox(0, "benchmark", number).standard_normal(len(part)))
    weights.flush()
    tempfile.tempdir = str(folder)
    before, start_time = anonymous_bytes(), time.perf_counter()
    classes = DyadicClasses(np.load(folder / "weights.npy", mmap_mode="r"))
    setup = time.perf_counter() - start_time
    drawn, step, start_time = 0, 0, time.perf_counter()
    while time.perf_counter() - start_time < seconds:
        drawn += len(classes.draw(philox(0, "draw", step), batch))
        step += 1
    return {
        "setup_s": setup,
        "draws_per_s": drawn / (time.perf_counter() - start_time),
        "memory_mb": (anonymous_bytes() - before) / 1e6,
    }


def main() -> None:
    """Measure every size and extrapolate to ten times the largest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder with 24 bytes of room per sample")
    parser.add_argument("--sizes", default="1e6,1e7,1e8")
    parser.add_argument("--batch", type=int, default=65_536, help="draws at once")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.out, int(options.one), options.batch, options.seconds)))
        return
    print("| pool | set-up s | draws/s | memory MB |\n|---|---|---|---|")
    found = []
    for size in [float(text) for text in options.sizes.split(",")]:
        folder = options.out / f"sampler-{size:.0e}"
        folder.mkdir(parents=True)
        command = [sys.executable, __file__, "--out", str(folder), "--one", str(size), "--batch", str(options.batch)]
        done = subprocess.run([*command, "--seconds", str(options.seconds)], check=True, stdout=subprocess.PIPE)
        result = json.loads(done.stdout)
        shutil.rmtree(folder)
        found.append((size, result))
        print(f"| {size:.0e} | {result['setup_s']:.1f} | {result['draws_per_s']:.2e} | {result['memory_mb']:.0f} |")
    if len(found) > 1:
        (small, first), (large, last) = found[-2:]
        slope = (last["setup_s"] - first["setup_s"]) / (large - small)
        print(f"\nset-up of {10 * large:.0e} by the slope of the last two: {last['setup_s'] + 9 * large * slope:.0f} s")


if __name__ == "__main__":
    main()
