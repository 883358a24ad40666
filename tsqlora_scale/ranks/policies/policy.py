"""How statistics become ranks: one small pure object per method, and the agreement of all processes on a plan."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from tsqlora_scale.config.schema import AllocationConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.ranks.allocate import Allocation, allocate


@dataclass(frozen=True)
class Statistics:
    """All that a policy may look at. Mappings share one order of layers, that of ``adapters.lora_layers``."""

    #: S_l, not normalised.
    sensitivity: dict[str, float]
    #: Ranks now.
    ranks: dict[str, int]
    #: (d_in, d_out) of each adapted matrix.
    dims: dict[str, tuple[int, int]]
    #: r_0, the rank of every layer at the start.
    initial_rank: int
    #: Mean quality of the selected samples, now and at the first scoring pass; in (0, 1).
    quality: float
    first_quality: float
    #: Events done, of those before the last of the schedule: 0 at the first, 1 at the last.
    progress: float = 1.0
    #: By layer, the importance of each of its components (see :func:`~.resize.component_importance`), which is what
    #: ``resize.shrink: importance`` keeps them by. Empty unless the policy asks.
    components: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def costs(self) -> dict[str, int]:
        """Parameters of one rank, d_in + d_out, by layer."""
        return {name: d_in + d_out for name, (d_in, d_out) in self.dims.items()}


@dataclass(frozen=True)
class Plan:
    """The ranks to install, and why."""

    ranks: dict[str, int]
    #: Quality factor of the budget.
    phi: float
    #: In ranks, or in parameters under ``budget_unit: params``.
    budget: int
    #: Normalised: sums to 1, unless every S is zero.
    sensitivity: dict[str, float]
    #: One line a layer: what it asked for, what bounds and rounding did.
    reasons: dict[str, str]

    def digest(self) -> str:
        """SHA-256 of what the plan decides: ranks, phi and budget, to the bit."""
        decided = [sorted(self.ranks.items()), float(self.phi).hex(), self.budget]
        return hashlib.sha256(json.dumps(decided).encode()).hexdigest()


class Policy(Protocol):
    """A rule that turns statistics into a plan: pure, so that every process computes the same one.

    How the plan is carried out is no policy's affair: moments, engines, checkpoints and files follow the ranks.
    """

    #: Whether it looks at :attr:`Statistics.components`. They cost gathering the factors' moments once more.
    needs_components: ClassVar[bool]

    def plan(self, stats: Statistics) -> Plan:
        """Ranks for every layer of ``stats``."""
        ...


@dataclass(frozen=True)
class TsqLoraPolicy:
    """Eq. 6: r_l = S_l / sum(S) * phi * R_0, with R_0 = r_0 L and phi = clip(Q / Q_first, phi_min, phi_max).

    Under ``budget_unit: params`` ranks stay proportional to S_l, and the budget phi * r_0 * sum(d_in + d_out)
    limits parameters; it is never less than one rank. No layer gets more than min(d_in, d_out) ranks, whatever
    ``r_max`` says.
    """

    needs_components: ClassVar[bool] = False

    config: AllocationConfig

    def plan(self, stats: Statistics) -> Plan:
        """See the class; ``r_max: none`` means 4 r_0."""
        cfg = self.config
        ceiling = 4 * stats.initial_rank if cfg.r_max is None else cfg.r_max
        costs = stats.costs if cfg.budget_unit == "params" else dict.fromkeys(stats.dims, 1)
        phi = quality_factor(stats.quality, stats.first_quality, cfg.phi_min, cfg.phi_max)
        # with r_min: 0 a small phi must not remove every layer: without any there is nothing to train or to score
        budget = max(round(phi * stats.initial_rank * sum(costs.values())), min(costs.values()))
        allocation = allocate(
            stats.sensitivity,
            budget=budget,
            costs=costs,
            r_min=cfg.r_min,
            r_max={name: min(ceiling, *dims) for name, dims in stats.dims.items()},
            before=stats.ranks,
            max_change=cfg.max_change,
        )
        return Plan(
            ranks=allocation.ranks,
            phi=phi,
            budget=budget,
            sensitivity=normalised(stats.sensitivity),
            reasons=_reasons(allocation, stats.ranks),
        )


def quality_factor(quality: float, first_quality: float, phi_min: float, phi_max: float) -> float:
    """phi = clip(Q / Q_first, phi_min, phi_max): 1 at the first event, then the budget follows the data's quality."""
    assert math.isfinite(quality), quality
    assert 0 < first_quality < math.inf, first_quality
    return min(max(quality / first_quality, phi_min), phi_max)


def normalised(sensitivity: dict[str, float]) -> dict[str, float]:
    """S_l / sum(S); negative and not finite values count as zero, and zeros stay zeros."""
    usable = {name: s if math.isfinite(s) and s > 0 else 0.0 for name, s in sensitivity.items()}
    total = math.fsum(usable.values())
    return {name: s / total if total > 0 else 0.0 for name, s in usable.items()}


def _reasons(allocation: Allocation, before: dict[str, int]) -> dict[str, str]:
    lines = {}
    for name, rank in allocation.ranks.items():
        limit = allocation.limits[name]
        bounded = f"held at {limit}" if limit else f"{allocation.share[name]:.2f} within bounds"
        lines[name] = f"asked {allocation.asked[name]:.2f}, {bounded}, rank {before[name]} -> {rank}"
    return lines


class PlanMismatch(RuntimeError):
    """Processes computed different plans; raised on all of them, before anything has changed."""


def agree(plan: Plan, world: World) -> Plan:
    """Rank 0's plan, once every process has computed the same one. A collective.

    Without this check, processes that disagree on a shape would hang in a later collective.

    Raises:
        PlanMismatch: on every rank, naming the ranks that differ from rank 0.
    """
    digests = world.gather_objects(plan.digest())
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise PlanMismatch(
            f"rank plans differ between processes: rank(s) {', '.join(map(str, differing))} of {world.size} disagree "
            f"with rank 0 (plan {digests[0][:12]}, budget {plan.budget} here); the statistics of the processes have "
            "diverged"
        )
    return world.broadcast(plan)
