"""What a launcher (``accelerate launch``, ``torchrun``, SLURM) has told this process, before any library is loaded."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_size() -> int:
    """Number of processes that were started together."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def launched_rank() -> int:
    """This process's number among them."""
    return int(os.environ["RANK"]) if launched() else 0


def launched_here() -> int:
    """How many of them are on this machine for sure: this one, where the launcher does not say (plain ``srun``)."""
    return min(launched_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def speaks_for_machine() -> bool:
    """Whether this is the first process on its machine."""
    return not launched() or int(os.environ.get("LOCAL_RANK", launched_rank())) == 0
