"""What the scores of a pool take of a rank's own memory does not grow with the pool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
#: With small blocks, so that a small pool is large.
MEASURE = """
import json, sys
from pathlib import Path
from benchmarks import pool
from tsqlora_scale.common import disk_arrays
from tsqlora_scale.quality.draws import key_order
disk_arrays.IN_MEMORY, disk_arrays.BLOCK = 0, 2**14
key_order.WINDOW, key_order.BITS, key_order.COUNTERS = 2**15, 16, 16
pool.measure(Path(sys.argv[1]), 10**5, sketch_dim=16, shard=2**14, batch=4096)  # what is taken once
found = pool.measure(Path(sys.argv[1]), int(sys.argv[2]), sketch_dim=16, shard=2**14, batch=4096)
print(json.dumps(found))
"""


def peak_mb(size: int, folder: Path) -> float:
    folder.mkdir()
    command = [sys.executable, "-c", MEASURE, str(folder), str(size)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert list(folder.iterdir()) == []
    return json.loads(done.stdout.splitlines()[-1])["memory MB"]


def test_it_does_not_grow(tmp_path: Path) -> None:
    size = 3_000_000
    column = size * 8 / 1e6
    small, large = peak_mb(size // 10, tmp_path / "small"), peak_mb(size, tmp_path / "large")
    if large - small >= column / 2:  # peaks of one and the same size differ by up to 17 MB, growth would be there again
        large = min(large, peak_mb(size, tmp_path / "again"))
    assert large - small < column / 2, f"{small:.0f} MB, {large:.0f} MB; one column of the larger has {column:.0f} MB"
