"""What a launcher (``accelerate launch``, ``torchrun``, SLURM) has told this process, before any library is loaded."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether a launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


#: What starts several tasks without telling them of one another as torch wants it, and where it says how many they are;
#: of SLURM the step's number wins, as a job of several tasks may have steps of one.
TASK_MANAGERS = {
    "srun": (("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")),
    "mpirun": (("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"),
               ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")),
}  # fmt: skip


def strangers() -> tuple[str, int] | None:
    """What started this process as one of several that know nothing of one another, and how many they are.

    None for a process that was started alone, or by a launcher that sets ``RANK`` and ``WORLD_SIZE``.
    """
    if launched():
        return None
    for manager, (numbers, sizes) in TASK_MANAGERS.items():
        size = next((os.environ[name] for name in sizes if os.environ.get(name, "").isdigit()), "1")
        if int(size) > 1 and any(name in os.environ for name in numbers):
            return manager, int(size)
    return None


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
