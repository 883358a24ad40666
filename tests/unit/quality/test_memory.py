"""Memory that a pass frees stays with the process, where glibc would give it back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from tsqlora_scale.quality.gradients.batch_memory import LiveBytes

PROBE = """
import sys, psutil, torch
from tsqlora_scale.quality.gradients.batch_memory import reuse_freed_memory
if sys.argv[1] == "reuse":
    reuse_freed_memory()
before = psutil.Process().memory_info().rss
block = torch.ones(2**26)  # 256 MB
del block
print((psutil.Process().memory_info().rss - before) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept() -> None:
    def kept(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", PROBE, how], check=True, capture_output=True, text=True)
        return int(done.stdout.splitlines()[-1])

    assert kept("default") < 64 < 200 < kept("reuse")


def test_the_most_that_is_alive_at_once() -> None:
    weight = torch.ones(64, 64)
    with LiveBytes([weight]) as live:
        for _ in range(5):
            x = torch.ones(1000)  # 4 kB, one at a time, but for the moment of the change
        y = weight.t() + x[:64]  # 16 kB
        del y
    assert 4000 + 64 * 64 * 4 <= live.peak <= 2 * 4000 + 64 * 64 * 4
