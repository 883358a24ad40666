"""The rank half of a run: it listens to the steps, and changes ranks at the schedule's events (paper 2.2 and 2.3)."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from tsqlora_scale.config.schema import Config
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.engine import Engine
from tsqlora_scale.ranks.gradient_sketches import SKETCH_ROWS
from tsqlora_scale.ranks.install import components, current_ranks, layer_dims, layer_factors, resize_model
from tsqlora_scale.ranks.policies.gain import most_ranks
from tsqlora_scale.ranks.policies.policy import Plan, Policy, Statistics, agree
from tsqlora_scale.ranks.rank_worth import held_part, rank_worths
from tsqlora_scale.ranks.schedule import Schedule
from tsqlora_scale.ranks.sensitivity import SensitivityTracker
from tsqlora_scale.tasks.packing import Packing


@dataclass(frozen=True)
class RankEvent:
    """What happened at an event.

    Attributes:
        plan: the ranks that were installed, and why.
        quality: the data's mean quality that the budget followed; None without scores.
        shrink_error: relative error of every layer that shrank.
        seconds: what it took.
    """

    plan: Plan
    quality: float | None
    shrink_error: dict[str, float]
    seconds: float

    def line(self) -> dict[str, Any]:
        """What the record says of it."""
        plan = self.plan
        return {
            "phi": plan.phi,
            "budget": plan.budget,
            "quality": self.quality,
            "sensitivity": plan.sensitivity,
            "ranks": plan.ranks,
            "reasons": plan.reasons,
            "shrink_error": self.shrink_error,
            "seconds": round(self.seconds, 6),
            **({"curve": plan.curve} if plan.curve else {}),
        }


class RankController(Protocol):
    """Decides the ranks of a run. It is told of every step, as :class:`~tsqlora_scale.step.StepListener` says."""

    def attach(self, module: nn.Module) -> None:
        """Listen to ``module``; before every ``prepare`` of an engine."""
        ...

    def start_step(self, step: int, *, loss_scale: float) -> None:
        """The optimizer step that follows ``step`` finished ones begins."""
        ...

    def start_micro_batch(self, size: int, position: int, packing: Packing | None = None) -> None:
        """A forward and backward pass over ``size`` samples, of the global batch from ``position`` on, begins; with
        ``packing`` they stand end to end in it."""
        ...

    def end_step(self, *, taken: bool) -> None:
        """The step's last backward pass is over; ``taken`` says whether the optimizer has stepped."""
        ...

    def due(self, step: int) -> bool:
        """Whether ranks change after ``step`` finished steps."""
        ...

    def adapt(self, engine: Engine, quality: float | None, step: int) -> RankEvent:
        """Take the sensitivities together, agree on a plan, resize every layer on every rank. A collective."""
        ...

    def synchronize(self, world: World) -> None:
        """Make the state the same on every rank, before :meth:`state_dict`. A collective."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that changes: JSON values and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`."""
        ...


class FixedRanks:
    """``allocation.policy: fixed``: ranks stay as they are, and nothing is listened to."""

    def attach(self, module: nn.Module) -> None:
        """Nothing to do."""

    def start_step(self, step: int, *, loss_scale: float) -> None:
        """Nothing to do."""

    def start_micro_batch(self, size: int, position: int, packing: Packing | None = None) -> None:
        """Nothing to do."""

    def end_step(self, *, taken: bool) -> None:
        """Nothing to do."""

    def due(self, step: int) -> bool:
        """Never."""
        return False

    def adapt(self, engine: Engine, quality: float | None, step: int) -> RankEvent:
        """Never called: no event is due."""
        raise AssertionError("fixed ranks have no events")

    def synchronize(self, world: World) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing changes."""


class AdaptiveRanks:
    """Listens by a tracker, plans by a policy, and carries the plan out.

    Args:
        config: of the run.
        policy: the rule.
        schedule: when ranks change.
        micro_batch_size: samples of a forward pass.
        without_batch: layers that never get the batch as their first dimension.

    Attributes:
        tracker: the sensitivities.
        policy: the rule.
        resize: how factors grow and shrink.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        *,
        schedule: Schedule,
        micro_batch_size: int,
        without_batch: Collection[str] = frozenset(),
    ) -> None:
        self.policy = policy
        self.resize = config.resize
        self._config = config
        self._schedule = schedule
        self._first_quality: float | None = None
        needs_worths = getattr(policy, "needs_worths", False)
        self.tracker = SensitivityTracker(
            config.sensitivity,
            batch_size=config.train.batch_size,
            micro_batch_size=micro_batch_size,
            sketch_seed=config.run.seed if needs_worths or config.resize.grow_init == "gradient" else None,
            sketch_rows=max(SKETCH_ROWS, most_ranks(config.allocation, config.adapter.r) if needs_worths else 0),
            halves=needs_worths,
            events=schedule.events,
            without_batch=without_batch,
        )

    def attach(self, module: nn.Module) -> None:
        """Hook the adapted layers."""
        self.tracker.attach(module)

    def start_step(self, step: int, *, loss_scale: float) -> None:
        """See :meth:`.SensitivityTracker.start_step`."""
        self.tracker.start_step(step, loss_scale=loss_scale)

    def start_micro_batch(self, size: int, position: int, packing: Packing | None = None) -> None:
        """See :meth:`.SensitivityTracker.start_micro_batch`."""
        self.tracker.start_micro_batch(size, position, packing)

    def end_step(self, *, taken: bool) -> None:
        """See :meth:`.SensitivityTracker.end_step`."""
        self.tracker.end_step(taken=taken)

    def due(self, step: int) -> bool:
        """At the schedule's events."""
        return self._schedule.due(step)

    def adapt(self, engine: Engine, quality: float | None, step: int) -> RankEvent:
        """See :class:`RankController`.

        Raises:
            PlanMismatch: on every rank, where the ranks plan differently.
        """
        start = time.perf_counter()
        plan = agree(self.policy.plan(self._statistics(engine, quality, step)), engine.world)
        errors = self.carry_out(plan, engine, step) if plan.ranks != current_ranks(engine.module) else {}
        return RankEvent(plan, quality, errors, time.perf_counter() - start)

    def _statistics(self, engine: Engine, quality: float | None, step: int) -> Statistics:
        if self._first_quality is None:
            self._first_quality = quality
        ranks = current_ranks(engine.module)
        return Statistics(
            sensitivity=self.tracker.reduce(engine.world),
            ranks=ranks,
            dims=layer_dims(engine.module),
            initial_rank=self._config.adapter.r,
            quality=quality or 1.0,
            first_quality=self._first_quality or 1.0,
            progress=self._schedule.progress(step),
            components=components(engine.gather(), ranks) if self.policy.needs_components else {},
            worths=self._worths(engine) if getattr(self.policy, "needs_worths", False) else {},
        )

    def _worths(self, engine: Engine) -> dict[str, tuple[float, ...]]:
        """What every layer's ranks are worth; after the tracker has reduced. A collective."""
        factors, halves = layer_factors(engine.module, engine.gather()), self.tracker.halves()
        held = {
            name: held_part(self.tracker.projection(name, len(b)), a, b, scaling)
            for name, (a, b, scaling) in factors.items()
        }
        return rank_worths(held, halves)

    def carry_out(self, plan: Plan, engine: Engine, step: int) -> dict[str, float]:
        """Install a plan: gather, pure algebra, rebuild. A collective.

        Returns:
            The relative error of each layer that shrank.
        """
        errors: dict[str, float] = {}
        sketches = self.tracker.sketches()

        def change(module: nn.Module, state: Any) -> Any:
            new_state, shrink_errors = resize_model(
                module,
                state,
                plan,
                cfg=self.resize,
                seed=self._config.run.seed,
                step=step,
                sketches=sketches,
            )
            errors.update(shrink_errors)
            return new_state

        engine.rebuild(change)
        return errors

    def synchronize(self, world: World) -> None:
        """See :meth:`.SensitivityTracker.synchronize`."""
        self.tracker.synchronize(world)

    def state_dict(self) -> dict[str, Any]:
        """The tracker's, and the quality that later ones are compared with."""
        return {"tracker": self.tracker.state_dict(), "first_quality": self._first_quality}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`."""
        self.tracker.load_state_dict(state["tracker"])
        self._first_quality = state["first_quality"]
