"""Which passes the scores need: losses alone, gradients, or a second forward too; decided on a few samples."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, Literal

import numpy as np

from tsqlora_scale.config.schema import ScoringConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality.pool import BatchT
from tsqlora_scale.quality.scores.equations import term_weights
from tsqlora_scale.quality.scores.loss_reduction import first_order_will_do
from tsqlora_scale.quality.scores.measurer import Measurer
from tsqlora_scale.quality.scores.score_parts import Kind, PassPart

log = logging.getLogger("tsqlora_scale")

#: Samples of the first shard on which the exact loss reduction is compared with its first order: one of so many, but
#: no fewer and no more than these, rounded up to whole batches. They belong to the pass like all others, so nothing is
#: measured twice.
ONE_OF, FEWEST, MOST = 16, 64, 256


class PassKind(Generic[BatchT]):
    """Measures shards by the cheapest passes that give what is asked for.

    Attributes:
        kind: None until the first shard has decided it; kept from then on.
        reason: why, in words; empty where the config says so.
    """

    def __init__(self, scoring: ScoringConfig, measurer: Measurer[BatchT], *, world: World) -> None:
        self._measurer = measurer
        self._world = world
        #: What the config asks for: ``auto`` is decided by ranking and rounding, ``exact`` by rounding.
        self.asked = _asked(scoring)
        self.kind: Kind | None = self.asked if self.asked in ("loss", "first_order") else None  # type: ignore[assignment]
        self.reason = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the score table that a pass measures."""
        return ("loss", "convergence") if self.asked == "loss" else ("loss", "grad_norm", "delta_loss", "convergence")

    def measure(self, shard: np.ndarray, progress: Callable[[int], None]) -> PassPart | None:
        """See :meth:`.Measurer.measure`. A shard of which all numbers are of the kind that is decided by its end."""
        if self.kind is not None:
            return self._noted(self._measurer.measure(shard, kind=self.kind, progress=progress))
        tried, rest = _tried(len(shard), self._measurer.prepare(shard, "exact"))
        part = self._measurer.measure(shard[tried], kind="exact", progress=progress)
        decided = self._world.broadcast(None if part is None else self._decide(part))
        assert decided is not None, "rank 0 has a part"
        self.kind, self.reason = decided
        if part is not None and self.kind == "first_order":
            part.values[:, 2] = self._measurer.eta * part.values[:, 1] ** 2
        self._measurer.prepare(shard, self.kind)
        if len(rest):
            done = len(tried)
            others = self._measurer.measure(shard[rest], kind=self.kind, progress=lambda more: progress(done + more))
            if part is not None and others is not None:
                part = _joined(part, others, np.concatenate([tried, rest]))
        elif part is not None:
            part = replace(part, kind=self.kind, batch_size=self._measurer.batch_size)
        return self._noted(part)

    def resume(self, part: tuple[int | None, bool | None, Kind, str]) -> None:
        """Go on with a killed pass, as its first part was measured: batch size, whether one at a time, kind, reason."""
        size, one_at_a_time, self.kind, self.reason = part
        self._measurer.resume(size, one_at_a_time, self.kind)

    def state_dict(self) -> dict[str, Any]:
        """The decision."""
        return {"kind": self.kind, "reason": self.reason}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the decision, unless the config leaves none."""
        if self.asked in ("auto", "exact"):
            self.kind, self.reason = state["kind"], state["reason"]

    def _decide(self, part: PassPart) -> tuple[Kind, str]:
        reason = first_order_will_do(
            part.values, eta=self._measurer.eta, rounding=part.rounding, by_rank=self.asked == "auto"
        )
        if reason is None:
            return "exact", ""
        # a run that asked for the exact one should know
        log.log(logging.WARNING if self.asked == "exact" else logging.INFO, "%s; using the first order", reason)
        return "first_order", reason

    def _noted(self, part: PassPart | None) -> PassPart | None:
        return None if part is None else replace(part, reason=self.reason)


def _asked(scoring: ScoringConfig) -> Literal["loss", "first_order", "exact", "auto"]:
    if scoring.convergence == "loss_trend" and not term_weights(scoring)[:2].any():
        return "loss"
    if scoring.delta_loss == "auto" and scoring.preset == "paper":
        return "exact"
    asked: Literal["exact", "first_order", "auto"] = scoring.delta_loss
    return asked


def _tried(size: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Places in a shard of the samples that are tried, and of the rest, both ascending.

    They are whole batches, so that the numbers of no sample depend on whether any are tried; of all lengths, by which
    a shard is sorted.
    """
    batches = -(-size // batch_size)
    count = -(-max(FEWEST, min(MOST, size // ONE_OF)) // batch_size)
    count = min(batches, count)
    numbers = ((np.arange(count) + 0.5) * batches / count).astype(np.int64)  # the middles of equal stretches
    tried = np.isin(np.arange(size) // batch_size, numbers)
    return np.flatnonzero(tried), np.flatnonzero(~tried)


def _joined(one: PassPart, other: PassPart, places: np.ndarray) -> PassPart:
    """Both parts, in the order in which ``places`` ascend; what was decided is the second one's."""
    order = np.argsort(places, kind="stable")
    indices, values, sketches = (
        np.concatenate(columns)[order]
        for columns in (
            (one.indices, other.indices),
            (one.values, other.values),
            (one.sketches, other.sketches),
        )
    )
    rounding = max(one.rounding, other.rounding)
    return replace(other, indices=indices, values=values, sketches=sketches, rounding=rounding)
