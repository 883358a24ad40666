"""The checkpoints of one run: which is the newest, which the best, and which can go."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tsqlora_scale.common.files import WRITE_ERRORS
from tsqlora_scale.engine.train_state import TrainState
from tsqlora_scale.run.checkpoint import checkpoint_dir, complete_checkpoints, prune, write_checkpoint

log = logging.getLogger("tsqlora_scale")


class RunCheckpoints:
    """Writes and prunes ``checkpoints/step-…``. Used on rank 0, but for :attr:`newest`, which all ranks know.

    Args:
        root: the folder of checkpoints.
        keep: how many of the newest stay.

    Attributes:
        newest: name of the newest checkpoint there was when one was last to be written.
        best: name of the best step's checkpoint, or of the best before it if that could not be written.
    """

    def __init__(self, root: Path, *, keep: int) -> None:
        self.root = root
        self.newest: str | None = None
        self.best: str | None = None
        self._keep = keep

    def write(self, step: int, state: TrainState, tree: dict[str, Any], *, is_best: bool) -> None:
        """Write a checkpoint and prune the others. Where it cannot be written, the run goes on without.

        Args:
            tree: the state beside parameters and moments; its ``best_kept`` is filled in here.
            is_best: whether it is that of the best evaluation so far.
        """
        folder = checkpoint_dir(self.root, step)
        best = folder.name if is_best else self.best
        try:
            write_checkpoint(folder, state, {**tree, "best_kept": best})
        except WRITE_ERRORS as error:
            complete = complete_checkpoints(self.root)
            log.warning(
                "the checkpoint of step %d cannot be written (%s); the run goes on, its newest checkpoint is %s",
                step,
                error,
                complete[-1].name if complete else "none",
            )
        else:
            self.best = best
            self._prune()
        complete = complete_checkpoints(self.root)
        self.newest = complete[-1].name if complete else None

    def is_newest(self, step: int) -> bool:
        """Whether the newest checkpoint, as it was when one was last to be written, is of that step."""
        return self.newest == checkpoint_dir(self.root, step).name

    def resume(self, best: str | None) -> None:
        """Go on from a checkpoint whose best one was ``best``: a later best one may have been kept in its place."""
        self.best = best if best is not None and (self.root / best).is_dir() else None

    def _prune(self) -> None:
        try:
            prune(self.root, keep=self._keep, protect={self.best} if self.best else set())
        except OSError as error:
            log.warning("older checkpoints cannot be removed (%s)", error)
