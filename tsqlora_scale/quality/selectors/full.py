"""``sampling.selector: full``: every sample of the pool, evenly."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from torch import nn

from tsqlora_scale.common.disk_arrays import blocks, counted, counts, filled, new_array
from tsqlora_scale.quality.draws.batch_sampler import BatchSampler
from tsqlora_scale.quality.draws.subset import importance_weights, loss_weights
from tsqlora_scale.quality.online.sample_listener import DeafListener, SampleListener
from tsqlora_scale.quality.scores.score_table import ScoreTable
from tsqlora_scale.quality.selectors.selector import SelectorContext

log = logging.getLogger("tsqlora_scale")


class FullSelector:
    """Draws from the whole pool, each sample once an epoch, and scores nothing.

    The pool's own weights (``task.dataset.weight``) multiply how often a sample is drawn, here and in every selector
    that builds on this one: see :meth:`_make_sampler`.

    See :class:`~tsqlora_scale.quality.selectors.selector.Selector`. Other selectors build on it: what they do before
    they know better is this.

    Raises:
        UserError: the disk of TMPDIR has no room, on any rank.
    """

    def __init__(self, context: SelectorContext) -> None:
        self.context = context
        self.config = context.config
        self.pool = context.pool
        self._has_warned = False
        with context.world.together():
            self._draw_weights = context.pool.draw_weights()
            #: Of a pool that is a mixture.
            self._sets = getattr(context.pool, "sets", None)
            self._sampler = self._make_sampler(self.subset(), None, start=0)

    def subset(self) -> np.ndarray:
        """The rows that are drawn from at first, (n,) int64."""
        return counted(len(self.pool))

    def _make_sampler(self, rows: np.ndarray, probabilities: np.ndarray | None, *, start: int) -> BatchSampler:
        """Draws from ``rows`` by ``probabilities`` (None: evenly), times the pool's weights, from ``start`` on."""
        probabilities = self._weighted(rows, probabilities)
        return BatchSampler(
            rows,
            probabilities,
            batch_size=self.config.train.batch_size,
            seed=self.config.run.seed,
            replacement=self.config.sampling.replacement and probabilities is not None,
            start=start,
        )

    def _weighted(self, rows: np.ndarray, probabilities: np.ndarray | None) -> np.ndarray | None:
        """``probabilities`` (n,) of ``rows`` times their weights, up to a constant; None: all alike.

        The sets of a mixture have the shares that are asked for, whatever ``probabilities`` would make of them: of the
        draws, or, where losses are weighed against ``probabilities``, of the objective.
        """
        if self._draw_weights is None:
            return probabilities
        weighted = new_array(len(rows), np.float64)
        for block in blocks(len(rows)):
            weighted[block] = self._draw_weights[rows[block]]
        if self.config.sampling.unbiased:
            self._balance(rows, weighted)
        if probabilities is not None:
            for block in blocks(len(rows)):
                weighted[block] *= probabilities[block]
        if not self.config.sampling.unbiased:
            self._balance(rows, weighted)
        return weighted

    def _drawn_by(self, probabilities: np.ndarray) -> np.ndarray | None:
        """``probabilities`` (n,) where samples are drawn by them; None: evenly."""
        return None if self.config.sampling.draws_evenly else probabilities

    def _loss_weights(self, rows: np.ndarray, probabilities: np.ndarray) -> np.ndarray | None:
        """What losses are multiplied by, of every sample of the pool, (N,): ``|S| p`` under ``sampling.use: weight``,
        ``1 / (|S| p)`` under ``sampling.unbiased``; None: nothing.

        Without replacement every sample is drawn once an epoch, whatever its probability, and there is nothing to
        correct.

        Args:
            rows: S, (n,).
            probabilities: of these, (n,), of sum 1.
        """
        sampling = self.config.sampling
        if sampling.use == "weight":
            weigh, probabilities = loss_weights, self._in_shares(rows, probabilities)
        elif sampling.weighs_losses:
            weigh = importance_weights
        else:
            return None
        found = filled(len(self.pool), np.float64, 1.0)
        found[rows] = weigh(probabilities, sampling.max_weight)
        return found

    def _in_shares(self, rows: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        """``probabilities`` (n,) of ``rows`` by which the sets of a mixture, drawn in their shares, keep them."""
        if self._draw_weights is None or self._sets is None:
            return probabilities
        drawn, wanted = self._weighted(rows, None), self._weighted(rows, probabilities)
        assert drawn is not None
        assert wanted is not None
        for block in blocks(len(rows)):
            share = drawn[block]  # which may be too small to be there
            wanted[block] = np.divide(wanted[block], share, out=np.zeros_like(share), where=share > 0)
        wanted /= wanted.sum()
        return wanted

    def _warn_of_lost_classes(self, rows: np.ndarray) -> None:
        """Say once, on rank 0, that S, the pool's ``rows``, lacks a class: by a model that has learned little the
        hardest samples may all be of one, and training on them forgets the others."""
        if self._has_warned or not self.context.world.is_main or len(rows) == len(self.pool):
            return
        classes = self.pool.class_ids()
        if classes is None:
            return
        of_pool = counts(classes)
        kept = np.bincount(classes[rows], minlength=len(of_pool))
        lost = int(np.count_nonzero((of_pool > 0) & (kept == 0)))
        if lost:
            self._has_warned = True
            if self.config.sampling.selector == "file" and self.config.sampling.keep_fraction == "auto":
                remedy = "sampling.file lists none of them: add some"
            elif self.config.chooses_within_labels or self.config.stratifies:
                remedy = "too few rows are kept for all of them: raise sampling.keep_fraction"
            else:
                remedy = "set sampling.stratify=true, by which they keep their shares"
            log.warning(
                "sampling.selector=%r: S holds no sample of %d of the %d classes; %s",
                self.config.sampling.selector,
                lost,
                np.count_nonzero(of_pool),
                remedy,
            )

    def _balance(self, rows: np.ndarray, weighted: np.ndarray) -> None:
        if self._sets is not None:
            self._sets.balance(rows, weighted)

    @property
    def table(self) -> ScoreTable | None:
        """None: nothing is scored."""
        return None

    def due(self, step: int) -> bool:
        """Never."""
        return False

    def score(self, module: nn.Module, step: int) -> None:
        """Nothing to do."""

    @property
    def listener(self) -> SampleListener:
        """Nothing is to be known of samples."""
        return DeafListener()

    def draw(self, step: int) -> np.ndarray:
        """See :class:`~tsqlora_scale.quality.draws.batch_sampler.BatchSampler`."""
        return self._sampler.draw(step)

    def draw_ahead(self, step: int) -> np.ndarray | None:
        """What :meth:`draw` will give if nothing is scored until then; None where that is not known. Changes nothing.

        A selector that draws in its own way says nothing, unless it has its own answer here, too.
        """
        return self._sampler.ahead(step) if type(self).draw is FullSelector.draw else None

    def weights(self, rows: np.ndarray) -> np.ndarray | None:
        """All equal."""
        return None

    def quality(self) -> float | None:
        """None: nothing is scored."""
        return None

    def finish(self) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, Any]:
        """What the draws depend on."""
        return {"sampler": self._sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the draws go on as they were.

        Raises:
            UserError: with other samples, weights or settings they would not.
        """
        self._sampler.load_state_dict(state["sampler"])
