"""The seam between statistics and ranks: what a policy may look at, what it decides, and that all processes agree."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from tsqlora_scale.engine.collectives import World


@dataclass(frozen=True)
class Statistics:
    """All that a policy may look at. Mappings share one order of layers, that of ``adapters.lora_layers``."""

    #: S_l, not normalised. Empty where the policy says that it does not need it.
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
    #: Whether no event was before this one.
    is_first: bool = False
    #: By layer, the importance of each of its components: see :func:`~.resize.component_importance`, which is what
    #: ``resize.shrink: importance`` keeps them by, or :class:`~.importance.ImportanceTracker`. Empty unless the policy
    #: asks.
    components: dict[str, tuple[float, ...]] = field(default_factory=dict)
    #: By layer, what its ranks 1, 2, ... are worth, falling (see :mod:`~tsqlora_scale.ranks.rank_worth`). Empty unless
    #: the policy asks.
    worths: dict[str, tuple[float, ...]] = field(default_factory=dict)

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
    #: (budget, share of all worth that it leaves unbought), where a policy finds the budget.
    curve: tuple[tuple[int, float], ...] = ()
    #: By layer, which of its components stay, ascending; what is missing to the rank is new. A layer that is not here
    #: shrinks as ``resize.shrink`` says.
    keep: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def changed(self, ranks: Mapping[str, int]) -> list[str]:
        """Layers that are not to stay as they are, with ``ranks`` now."""
        return [name for name, rank in self.ranks.items() if rank != ranks[name] or not self.keeps_all(name, ranks)]

    def keeps_all(self, name: str, ranks: Mapping[str, int]) -> bool:
        """Whether a layer loses no component by choice, with ``ranks`` now."""
        return name not in self.keep or len(self.keep[name]) == ranks[name]

    def digest(self) -> str:
        """SHA-256 of what the plan decides: ranks, phi and budget, to the bit, and components."""
        decided: list[Any] = [sorted(self.ranks.items()), float(self.phi).hex(), self.budget]
        if self.keep:
            decided.append(sorted(self.keep.items()))
        return hashlib.sha256(json.dumps(decided).encode()).hexdigest()


class Policy(Protocol):
    """A rule that turns statistics into a plan: pure, so that every process computes the same one.

    Built as ``Policy(config.allocation)``. Two more class variables may be left out: ``tracks_components``, whether
    :attr:`Statistics.components` are to be smoothed over steps (:class:`~.importance.ImportanceTracker`), false if
    missing; and ``needs_sensitivity``, whether it looks at :attr:`Statistics.sensitivity`, true if missing.

    How the plan is carried out is no policy's affair: moments, engines, checkpoints and files follow the ranks.
    """

    #: Whether it looks at :attr:`Statistics.components`. They cost gathering the factors' moments once more.
    needs_components: ClassVar[bool]
    #: Whether it looks at :attr:`Statistics.worths`, for which gradients are sketched twice. A policy that does not say
    #: does not.
    needs_worths: ClassVar[bool] = False

    def plan(self, stats: Statistics) -> Plan:
        """Ranks for every layer of ``stats``."""
        ...


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
