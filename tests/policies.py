"""Other rules for ranks than the package's own, to be run through the loop."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

from tsqlora_scale.config.schema import AllocationConfig
from tsqlora_scale.ranks import Plan, Statistics


def plan_of(ranks: dict[str, int]) -> Plan:
    """A plan without more to say."""
    return Plan(ranks=ranks, phi=1.0, budget=sum(ranks.values()), sensitivity={}, reasons={})


class RemoveAndRestore:
    """Every third layer loses its adapter at one event and gets it back at the next; the others grow and shrink."""

    needs_components: ClassVar[bool] = False

    def __init__(self, _: AllocationConfig) -> None:
        pass

    def plan(self, stats: Statistics) -> Plan:
        """From the present ranks alone."""
        removed = 0 in stats.ranks.values()
        choices = (stats.initial_rank, stats.initial_rank + 2, 2) if removed else (0, 3, stats.initial_rank + 1)
        ranks = {name: choices[i % 3] for i, name in enumerate(stats.ranks)}
        return plan_of(ranks)


class AdaLoraRule:
    """2303.10512, Eq. 12: of all components the b(t) most important stay, b(t) falling by a cubic."""

    needs_components: ClassVar[bool] = True

    final = 16
    #: What it was told, by all of its kind.
    told: ClassVar[list[Statistics]] = []

    def __init__(self, _: AllocationConfig) -> None:
        self.told.clear()

    def plan(self, stats: Statistics) -> Plan:
        """A layer's rank is the number of its components among the b(t) best."""
        self.told.append(stats)
        start = stats.initial_rank * len(stats.ranks)
        budget = round(self.final + (start - self.final) * (1 - stats.progress) ** 3)
        best = sorted((-s, name, k) for name, scores in stats.components.items() for k, s in enumerate(scores))[:budget]
        kept = Counter(name for _, name, _ in best)
        return plan_of({name: kept[name] for name in stats.ranks})


class ElaLoraRule:
    """2504.00254: of the k lowest components of every matrix, the b lowest go, and the owners of the b highest grow."""

    needs_components: ClassVar[bool] = True

    b, k = 6, 2

    def __init__(self, _: AllocationConfig) -> None:
        pass

    def plan(self, stats: Statistics) -> Plan:
        """The total stays; b falls as 1 - p^3."""
        count = round(self.b * (1 - stats.progress**3))
        pool = sorted((s, name) for name, scores in stats.components.items() for s in sorted(scores)[: self.k])
        ranks = dict(stats.ranks)
        for _, name in pool[:count]:
            ranks[name] -= 1
        for _, name in pool[len(pool) - count :]:
            ranks[name] += 1
        return plan_of(ranks)


class Scripted:
    """Layers in turn: leave and come back, grow, or stay."""

    needs_components: ClassVar[bool] = False

    def __init__(self, _: AllocationConfig) -> None:
        pass

    def plan(self, stats: Statistics) -> Plan:
        """From the present ranks alone."""
        choices = (0, 4, 4) if 0 not in stats.ranks.values() else (4, 7, 4)
        return plan_of({name: choices[i % 3] for i, name in enumerate(stats.ranks)})
