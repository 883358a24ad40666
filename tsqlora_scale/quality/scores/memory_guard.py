"""Work on samples that may be too many for the memory: half as many at once, until it fits."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.lockstep import Lockstep
from tsqlora_scale.quality.gradients.batch_memory import is_out_of_memory

log = logging.getLogger("tsqlora_scale")

#: From rows (B,) to tensors of B entries each.
Work = Callable[[np.ndarray], tuple[Tensor, ...]]


class MemoryGuard:
    """All forward and backward passes of scoring go through this.

    A rank whose model is its own halves alone. Under ZeRO-3 a pass is a collective: there all ranks take as many pieces
    and halve together, one that has run out of memory in the middle of a pass included (:mod:`~.lockstep`). Where
    that cannot be, the error ends the run.

    Attributes:
        fits: samples that have been found to fit at once; None while no allocation has failed.
    """

    def __init__(self, module: nn.Module, world: World, *, fits: int | None = None) -> None:
        self.fits = fits
        self._world = world
        self._passes = Lockstep(module, mends=is_out_of_memory)
        self._reason = "on another rank"

    def run(self, kind: str, work: Work, rows: np.ndarray, *, longest: int | None = None) -> tuple[Tensor, ...]:
        """``work`` on all ``rows``, in one piece or in several. A collective, if the model is sharded.

        Args:
            kind: of the passes that ``work`` makes; one kind makes the same ones, whatever the rows.
            rows: 1 or more.
            longest: the largest number of rows that any rank has now.

        Raises:
            UserError: a single sample does not fit; if the model is sharded, on every rank.
        """
        sharded = self._passes.matters
        total = max(longest or 0, len(rows)) if sharded else len(rows)
        if not self._passes.knows(kind):
            self._passes.run(kind, lambda: work(rows[:1]))
        while True:
            size = min(self.fits or total, total)
            pieces: list[tuple[Tensor, ...]] = []
            for start in range(0, total, size):
                piece = rows[start : start + size]
                found = self._tried(kind, work, piece if len(piece) else rows[:1])
                if sharded and bool(self._world.max(torch.tensor([int(found is None)])).item()):
                    found = None
                if found is None:
                    break
                if len(piece):
                    pieces.append(found)
            else:
                return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))
            self._halve(size)

    def _tried(self, kind: str, work: Work, piece: np.ndarray) -> tuple[Tensor, ...] | None:
        try:
            return self._passes.run(kind, lambda: work(piece))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not self._passes.caught_up:  # else the others wait in a gather
                raise
            self._reason = " ".join(str(error).split())[:200]
        return None

    def _halve(self, size: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size == 1:
            raise UserError(
                f"out of memory while scoring a single sample ({self._reason}); set scoring.max_length to fewer "
                "tokens, model.gradient_checkpointing=true, or scoring.proxy_model to a smaller model"
            )
        self.fits = size // 2
        log.warning("out of memory while scoring %d samples at once; going on with %d", size, self.fits)
