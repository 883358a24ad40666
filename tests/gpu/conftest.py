"""Tests of what only a GPU does: ``pytest tests/gpu``, alone in a session; tiny models, seconds each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# read once in a process, and most of these tests share one
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder need a GPU."""
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device, or hidden from a session with other tests"))
