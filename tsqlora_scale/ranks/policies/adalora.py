"""``allocation.policy: adalora``: of all components the b(t) most important stay (2303.10512)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tsqlora_scale.config.schema import AllocationConfig
from tsqlora_scale.ranks.policies.policy import Plan, Statistics
from tsqlora_scale.ranks.policies.tsqlora import normalised


@dataclass(frozen=True)
class AdaLoraPolicy:
    """At an event the budget is b(p) = floor((b_0 - b_T)(1 - p)^3 + b_T), p rising from 0 at the first event to 1 at
    the last, b_0 = r L, b_T = ``target_r`` L. The most important b(p) of all components stay, whatever their layers;
    ties go to the earlier layer, and in it to the earlier component. ``schedule.start`` is AdaLoRA's t_i, ``end`` its
    T - t_f, ``every`` its Delta_T. The first of several events drops nothing.

    AdaLoRA sets the diagonal of what it drops to zero and goes on training it, so that it can return at a later event.
    Here components are dropped for good, with their parameters and moments: memory and time follow the budget. Up to
    and including the first event that drops any both keep the same ones.

    A layer never has fewer than ``r_min`` components (AdaLoRA: 0) as long as it has that many; where this asks for more
    than the budget, it wins.
    """

    needs_components: ClassVar[bool] = True
    tracks_components: ClassVar[bool] = True
    needs_sensitivity: ClassVar[bool] = False

    config: AllocationConfig

    def plan(self, stats: Statistics) -> Plan:
        """See the class."""
        start = stats.initial_rank
        target = self.config.adalora_target(start)
        budget = cubic_budget(start * len(stats.ranks), target * len(stats.ranks), stats.progress)
        keep = most_important_of_all(stats.components, budget, r_min=self.config.r_min)
        ranks = {name: len(keep[name]) for name in stats.ranks}
        return Plan(
            ranks=ranks,
            phi=1.0,
            budget=budget,
            sensitivity=normalised({name: sum(scores) for name, scores in stats.components.items()}),
            reasons={
                name: f"{rank} of {stats.ranks[name]} components are among the {budget} that stay"
                for name, rank in ranks.items()
            },
            keep=keep,
        )


def cubic_budget(initial: int, target: int, progress: float) -> int:
    """Components that the event of ``progress``, in [0, 1], leaves in all layers together."""
    return int((initial - target) * (1 - progress) ** 3 + target)


def most_important_of_all(
    components: Mapping[str, tuple[float, ...]], budget: int, *, r_min: int
) -> dict[str, tuple[int, ...]]:
    """Which components stay, ascending, by layer: the best ``r_min`` of each, then the best of the others up to
    ``budget`` altogether."""
    best = sorted(
        (-score, place, k, name)
        for place, (name, scores) in enumerate(components.items())
        for k, score in enumerate(scores)
    )
    kept: dict[str, list[int]] = {name: [] for name in components}
    rest = []
    for _, _, k, name in best:
        if len(kept[name]) < r_min:
            kept[name].append(k)
        else:
            rest.append((k, name))
    for k, name in rest[: max(budget - sum(map(len, kept.values())), 0)]:
        kept[name].append(k)
    return {name: tuple(sorted(chosen)) for name, chosen in kept.items()}


#: What the config's name stands for.
POLICY = AdaLoraPolicy
