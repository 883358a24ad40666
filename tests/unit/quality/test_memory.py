"""Memory that a pass frees stays with the process, where glibc would give it back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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
