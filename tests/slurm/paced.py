"""A selector that says on which node it draws, and that takes its time in a job's first lives."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.quality.selectors.by_quality import QualitySelector

#: Seconds before a step of the lives that are to be interrupted.
PACE = 1.5


class PacedSelector(QualitySelector):
    """Draws what :class:`QualitySelector` does.

    ``PACED_LIVES`` lives of a job are slow, if the environment says so; ``PACED_NODES`` is a folder for notes.
    """

    def draw(self, step: int) -> np.ndarray:
        if notes := os.environ.get("PACED_NODES"):
            (Path(notes) / f"rank-{launched_rank()}").write_text(os.environ["SLURMD_NODENAME"], encoding="utf-8")
        if int(os.environ.get("SLURM_RESTART_COUNT", 0)) < int(os.environ.get("PACED_LIVES", 0)):
            time.sleep(PACE)
        return super().draw(step)
