"""A selector that a study chooses by the config: even draws first, later without what has cost most at its visits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora_scale.common.disk_arrays import positions
from tsqlora_scale.quality.draws.key_order import largest
from tsqlora_scale.quality.online.loss_listener import LossListener
from tsqlora_scale.quality.online.sample_listener import SampleListener
from tsqlora_scale.quality.selectors.full import FullSelector
from tsqlora_scale.quality.selectors.selector import SelectorContext

#: The part of every class that is left out.
LEFT_OUT = 0.2


class MeanLosses(LossListener):
    """Keeps the mean loss of all visits of a sample in the place of the last one's."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._sums, self._visits = np.zeros(size), np.zeros(size)

    def take(self, rows: np.ndarray, numbers: Tensor, *, taken: bool) -> None:
        """See :class:`tsqlora_scale.quality.online.sample_listener.SampleListener`."""
        values = numbers.double().numpy()
        finite = np.isfinite(values)
        seen = rows[finite]
        np.add.at(self._sums, seen, values[finite])
        np.add.at(self._visits, seen, 1)
        self.losses[seen] = self._sums[seen] / self._visits[seen]

    def state_dict(self) -> dict[str, Tensor]:
        """Means, sums and numbers of visits."""
        own = {"sums": torch.from_numpy(self._sums), "visits": torch.from_numpy(self._visits)}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue with them."""
        super().load_state_dict(state)
        self._sums[:], self._visits[:] = state["sums"].numpy(), state["visits"].numpy()


class SmallLosses(FullSelector):
    """Draws evenly for ``scoring.warmup_steps`` steps; then, of every class, without the :data:`LEFT_OUT` of the
    largest mean loss over all visits so far. What was never visited stays.

    A visit's loss is that before the step which learns from it, but of other samples the model has learned by then: a
    wrong label costs much as long as it is not memorised.
    """

    def __init__(self, context: SelectorContext) -> None:
        self._losses = MeanLosses(len(context.pool))
        self._kept: np.ndarray | None = None
        super().__init__(context)

    @property
    def listener(self) -> SampleListener:
        """Hears the losses."""
        return self._losses

    def due(self, step: int) -> bool:
        """After the warm-up, once."""
        start = self.context.scoring_step
        return self._kept is None and start is not None and step >= start

    def score(self, module: nn.Module, step: int) -> None:
        """No pass: the losses are there already. A collective."""
        classes = self.pool.class_ids()
        assert classes is not None, "the study's pools have classes"
        self._draw_from(small(self._losses.losses, np.asarray(classes)), step)

    def state_dict(self) -> dict[str, Any]:
        """The sampler's, the losses, and what is left."""
        kept = None if self._kept is None else torch.from_numpy(self._kept)
        return {**super().state_dict(), "losses": self._losses.state_dict(), "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~tsqlora_scale.quality.selectors.selector.Selector`."""
        self._losses.load_state_dict(state["losses"])
        if state["kept"] is not None:
            self._draw_from(state["kept"].numpy(), state["sampler"]["start"])
        super().load_state_dict(state)

    def _draw_from(self, kept: np.ndarray, start: int) -> None:
        self._kept = kept
        with self.context.world.together():
            self._sampler = self._make_sampler(positions(kept), None, start=start)


def small(losses: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """All but the :data:`LEFT_OUT` of the largest losses within each class, (N,) bool; unknown ones (NaN) are small."""
    known = np.isfinite(losses)
    sizes = np.bincount(classes)
    known_sizes = np.bincount(classes[known], minlength=len(sizes))
    quota = np.minimum(np.rint(LEFT_OUT * sizes).astype(np.int64), known_sizes)
    kept: np.ndarray = ~largest(np.where(known, losses, -np.inf), quota, classes)
    return kept
