"""``sampling.selector: infobatch``: skip a part of what is known by now, and weigh the rest of it up.

Qin et al., *InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning*, 2303.04947: in every epoch half of
the samples whose last loss is below the mean are left out, drawn anew, and the losses of the other half of them count
twice, so that the gradient is that of the whole pool in expectation; the last eighth of the run skips nothing. The
losses are those that the training steps have in passing. A step's loss is normalised by its weights here, as
everywhere in this project, where theirs is divided by the number of samples.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
import torch

from tsqlora_scale.common.disk_arrays import filled, positions
from tsqlora_scale.common.random_streams import philox, uniform
from tsqlora_scale.quality.online.loss_listener import LossListener
from tsqlora_scale.quality.online.sample_listener import SampleListener
from tsqlora_scale.quality.selectors.full import FullSelector
from tsqlora_scale.quality.selectors.selector import SelectorContext

#: Share of the samples below the mean that an epoch skips; share of the run, at its end, that skips nothing.
SKIPPED, WHOLE = 0.5, 0.125


class InfoBatchSelector(FullSelector):
    """Epochs over what is left of the pool; the first one over all of it. The query's rows are never skipped.

    An epoch's last batch is filled up with samples of it, drawn once more.
    """

    def __init__(self, context: SelectorContext) -> None:
        self._losses = LossListener(len(context.pool))
        self._kept = filled(len(context.pool), bool, True)
        self._heavy = filled(len(context.pool), bool, False)
        self._start = 0
        super().__init__(context)

    @property
    def listener(self) -> SampleListener:
        """Hears the losses."""
        return self._losses

    def draw(self, step: int) -> np.ndarray:
        """The next batch of the epoch, or the first of the next one."""
        if self._is_over(step):
            self._begin(step)
        return super().draw(step)

    def draw_ahead(self, step: int) -> np.ndarray | None:
        """The next batch of the epoch; of another one nothing is known, as losses decide."""
        return None if self._is_over(step) else self._sampler.ahead(step)

    def weights(self, rows: np.ndarray) -> np.ndarray | None:
        """``1 / (1 - SKIPPED)`` of samples that might have been skipped, else 1."""
        if not self._heavy.any():
            return None
        weights: np.ndarray = 1.0 + self._heavy[rows] * SKIPPED / (1 - SKIPPED)
        return weights

    def state_dict(self) -> dict[str, Any]:
        """The losses, and who is left of the present epoch."""
        epoch = {"start": self._start, "kept": torch.from_numpy(self._kept), "heavy": torch.from_numpy(self._heavy)}
        return {**super().state_dict(), "epoch": epoch, "losses": self._losses.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~tsqlora_scale.quality.selectors.selector.Selector`."""
        epoch = state["epoch"]
        self._start = epoch["start"]
        self._kept[:], self._heavy[:] = epoch["kept"].numpy(), epoch["heavy"].numpy()
        self._losses.load_state_dict(state["losses"])
        with self.context.world.together():
            self._sampler = self._make_sampler(positions(self._kept), None, start=self._start)
        super().load_state_dict(state)

    def _balance(self, rows: np.ndarray, weighted: np.ndarray) -> None:
        """Nothing: the pool's weights have the sets' shares, and what an epoch lacks of a set weighs double."""

    def _is_over(self, step: int) -> bool:
        """Whether the epoch ends before ``step``."""
        return step >= self._start + ceil(int(np.count_nonzero(self._kept)) / self.config.train.batch_size)

    def _begin(self, step: int) -> None:
        """Another epoch, from ``step`` on; of the losses that are known by now, so the same on every rank."""
        train, size = self.config.train, len(self.pool)
        total = train.max_steps or ceil((train.epochs or 0) * size / train.batch_size)
        with self.context.world.together():
            below = below_the_mean(self._losses.losses)
            below[size - self.pool.query_rows :] = False
            if step >= (1 - WHOLE) * total:
                below[:] = False
            skipped = below & (uniform(philox(self.config.run.seed, "infobatch", step), size) < SKIPPED)
            self._start, self._kept, self._heavy = step, ~skipped, below & ~skipped
            self._sampler = self._make_sampler(positions(self._kept), None, start=step)


def below_the_mean(losses: np.ndarray) -> np.ndarray:
    """Whose loss is below the mean of those known, (N,) bool; unknown ones (NaN) are not."""
    known: np.ndarray = np.isfinite(losses)
    if not known.any():
        return known
    below: np.ndarray = known & (np.where(known, losses, np.inf) < losses[known].mean())
    return below
