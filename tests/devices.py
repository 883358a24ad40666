"""Which tests may see a GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

#: The tests that need one.
ON_GPU = Path(__file__).parent / "gpu"


def hide_gpus(arguments: Sequence[str]) -> None:
    """Hide GPUs from all other tests: their ranks meet over gloo, and NCCL takes no two ranks on one GPU.

    Before CUDA is looked for. Tests of ``tests/gpu`` in one session with others find none, and are skipped.

    Args:
        arguments: paths and node ids that pytest was asked for.
    """
    named = [Path(argument.split("::")[0]).resolve() for argument in arguments]
    if not named or not all(path.is_relative_to(ON_GPU) for path in named):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
