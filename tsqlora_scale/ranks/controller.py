"""The rank half of a run: it listens to the steps, and changes ranks at the schedule's events (paper 2.2 and 2.3)."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from tsqlora_scale.config.schema import Config
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.engine import Engine
from tsqlora_scale.ranks.gradient_sketches import SKETCH_ROWS
from tsqlora_scale.ranks.importance import ImportanceTracker
from tsqlora_scale.ranks.install import components, current_ranks, layer_dims, layer_factors, resize_model
from tsqlora_scale.ranks.orthogonality import OrthogonalityPenalty
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


class GradientListener(Protocol):
    """What hears the gradients of a step, or adds to them."""

    def attach(self, model: nn.Module) -> None:
        """Hook ``model``, anew after every resize."""
        ...

    def start_step(self, step: int, *, loss_scale: float) -> None:
        """See :class:`RankController`."""
        ...

    def start_micro_batch(self, size: int, position: int, packing: Packing | None = None) -> None:
        """See :class:`RankController`."""
        ...

    def end_step(self, *, taken: bool) -> None:
        """See :class:`RankController`."""
        ...


class _Listening:
    """What both kinds of controllers tell their listeners, in their order."""

    listeners: Sequence[GradientListener] = ()

    def attach(self, module: nn.Module) -> None:
        """Hook the adapted layers."""
        for listener in self.listeners:
            listener.attach(module)

    def start_step(self, step: int, *, loss_scale: float) -> None:
        """See :class:`RankController`."""
        for listener in self.listeners:
            listener.start_step(step, loss_scale=loss_scale)

    def start_micro_batch(self, size: int, position: int, packing: Packing | None = None) -> None:
        """See :class:`RankController`."""
        for listener in self.listeners:
            listener.start_micro_batch(size, position, packing)

    def end_step(self, *, taken: bool) -> None:
        """See :class:`RankController`."""
        for listener in self.listeners:
            listener.end_step(taken=taken)


class FixedRanks(_Listening):
    """``allocation.policy: fixed``: ranks stay as they are, and no sensitivity is listened to.

    Args:
        penalty: on the factors; none: nothing is added to the loss.
    """

    def __init__(self, penalty: OrthogonalityPenalty | None = None) -> None:
        self.listeners = [penalty] if penalty else []

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


class AdaptiveRanks(_Listening):
    """Listens by a tracker, plans by a policy, and carries the plan out.

    Args:
        config: of the run.
        policy: the rule.
        schedule: when ranks change.
        micro_batch_size: samples of a forward pass.
        without_batch: layers that never get the batch as their first dimension.
        penalty: on the factors; none: nothing is added to the loss.

    Attributes:
        tracker: the sensitivities; silent where the policy does not ask for them.
        importances: those of components, where the policy wants them smoothed.
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
        penalty: OrthogonalityPenalty | None = None,
    ) -> None:
        self.policy = policy
        self.resize = config.resize
        self._config = config
        self._schedule = schedule
        self._first_quality: float | None = None
        self._needs_worths = bool(getattr(policy, "needs_worths", False))
        self.tracker = SensitivityTracker(
            config.sensitivity,
            batch_size=config.train.batch_size,
            micro_batch_size=micro_batch_size,
            sketch_seed=config.run.seed if self._needs_worths or config.resize.grow_init == "gradient" else None,
            sketch_rows=max(SKETCH_ROWS, most_ranks(config.allocation, config.adapter.r) if self._needs_worths else 0),
            halves=self._needs_worths,
            events=schedule.events,
            without_batch=without_batch,
        )
        tracks = bool(getattr(policy, "tracks_components", False))
        self.importances = ImportanceTracker(config.sensitivity, events=schedule.events) if tracks else None
        self._hears = bool(getattr(policy, "needs_sensitivity", True)) or config.resize.grow_init == "gradient"
        found = (penalty, self.tracker if self._hears else None, self.importances)
        self.listeners = [listener for listener in found if listener is not None]

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
        ranks = current_ranks(engine.module)
        errors: dict[str, float] = {}
        if plan.changed(ranks):
            if self.importances is not None:
                self.importances.follow(plan, ranks)
            errors = self.carry_out(plan, engine, step)
        return RankEvent(plan, quality, errors, time.perf_counter() - start)

    def _statistics(self, engine: Engine, quality: float | None, step: int) -> Statistics:
        if self._first_quality is None:
            self._first_quality = quality
        ranks = current_ranks(engine.module)
        return Statistics(
            sensitivity=self.tracker.reduce(engine.world) if self._hears else {},
            ranks=ranks,
            dims=layer_dims(engine.module),
            initial_rank=self._config.adapter.r,
            quality=quality or 1.0,
            first_quality=self._first_quality or 1.0,
            progress=self._schedule.progress(step),
            is_first=step == self._schedule.events[0],
            components=self._components(engine, ranks),
            worths=self._worths(engine) if self._needs_worths else {},
        )

    def _worths(self, engine: Engine) -> dict[str, tuple[float, ...]]:
        """What every layer's ranks are worth; after the tracker has reduced. A collective."""
        factors, halves = layer_factors(engine.module, engine.gather()), self.tracker.halves()
        held = {
            name: held_part(self.tracker.projection(name, len(b)), a, b, scaling)
            for name, (a, b, scaling) in factors.items()
        }
        return rank_worths(held, halves)

    def _components(self, engine: Engine, ranks: Mapping[str, int]) -> dict[str, tuple[float, ...]]:
        if self.importances is not None:
            return self.importances.reduce(engine.world)
        return components(engine.gather(), ranks) if self.policy.needs_components else {}

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
        """See :meth:`.SensitivityTracker.synchronize`; importances are the same everywhere after every step."""
        if self._hears:
            self.tracker.synchronize(world)

    def state_dict(self) -> dict[str, Any]:
        """The trackers', and the quality that later ones are compared with."""
        importances = {} if self.importances is None else {"importances": self.importances.state_dict()}
        return {"tracker": self.tracker.state_dict(), "first_quality": self._first_quality, **importances}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`."""
        self.tracker.load_state_dict(state["tracker"])
        self._first_quality = state["first_quality"]
        if self.importances is not None:
            self.importances.load_state_dict(state["importances"])
