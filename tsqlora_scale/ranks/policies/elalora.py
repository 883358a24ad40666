"""``allocation.policy: elalora``: the least important components go where more important ones are (2504.00254)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tsqlora_scale.config.schema import AllocationConfig
from tsqlora_scale.ranks.policies.policy import Plan, Statistics
from tsqlora_scale.ranks.policies.tsqlora import normalised


@dataclass(frozen=True)
class ElaLoraPolicy:
    """At an event the ``candidates`` least important components of every layer make a pool. Its least important ones
    are dropped, ``moves`` (1 - p^3), rounded, of them, and the owners of as many most important ones get one new
    component each; p rises from 0 at the first event to 1 at the last. The sum of ranks stays. A layer can lose a
    component and get another one at the same event.

    Drops and gains come in pairs, the least important with the most important, the second least with the second most,
    until all are made or a component would be in both parts. What would take a layer below ``r_min`` is passed over
    among the drops, and above ``r_max`` (none: 4 r) or min(d_in, d_out) among the gains. Of two equals the one of the
    earlier layer, and in it the earlier one, is the less important.

    The authors' trainer resets Adam's moments and lets the learning rate stand still at an event. Here both go on.
    """

    needs_components: ClassVar[bool] = True
    tracks_components: ClassVar[bool] = True
    needs_sensitivity: ClassVar[bool] = False

    config: AllocationConfig

    def plan(self, stats: Statistics) -> Plan:
        """See the class."""
        cfg = self.config
        ceiling = 4 * stats.initial_rank if cfg.r_max is None else cfg.r_max
        progress = 0.0 if stats.is_first else stats.progress  # the only event is not the last of many
        moves = exchange(
            stats.components,
            round(cfg.moves * (1 - progress**3)),
            candidates=cfg.candidates,
            r_min=cfg.r_min,
            r_max={name: min(ceiling, *dims) for name, dims in stats.dims.items()},
        )
        lost, gained = Counter(name for name, _ in moves.dropped), Counter(moves.expanded)
        ranks = {name: rank - lost[name] + gained[name] for name, rank in stats.ranks.items()}
        return Plan(
            ranks=ranks,
            phi=1.0,
            budget=sum(stats.ranks.values()),
            sensitivity=normalised({name: sum(scores) for name, scores in stats.components.items()}),
            reasons={
                name: f"{lost[name]} components dropped, {gained[name]} new, rank {stats.ranks[name]} -> {rank}"
                for name, rank in ranks.items()
            },
            keep={
                name: tuple(k for k in range(rank) if (name, k) not in moves.dropped)
                for name, rank in stats.ranks.items()
            },
        )


@dataclass(frozen=True)
class Exchange:
    """Components that are dropped, (layer, place in it), and layers that get a new one, as often as they get any."""

    dropped: tuple[tuple[str, int], ...]
    expanded: tuple[str, ...]


def exchange(
    components: Mapping[str, tuple[float, ...]],
    count: int,
    *,
    candidates: int,
    r_min: int,
    r_max: Mapping[str, int],
) -> Exchange:
    """Up to ``count`` pairs of a drop and a gain; see :class:`ElaLoraPolicy`.

    Args:
        components: importances by layer; its order is what "earlier" means.
        candidates: of each layer, that make the pool.
        r_min: fewest components of a layer.
        r_max: most, by layer.
    """
    pool = sorted(
        (score, place, k, name)
        for place, (name, scores) in enumerate(components.items())
        for k, score in sorted(enumerate(scores), key=lambda pair: (pair[1], pair[0]))[:candidates]
    )
    ranks = {name: len(scores) for name, scores in components.items()}
    dropped: list[tuple[str, int]] = []
    expanded: list[str] = []
    low, high = 0, len(pool) - 1
    while len(dropped) < count:
        while low <= high and ranks[pool[low][3]] <= r_min:
            low += 1
        if low > high:
            break
        loser = pool[low][3]
        after = {**ranks, loser: ranks[loser] - 1}
        while high > low and after[pool[high][3]] >= r_max[pool[high][3]]:
            high -= 1
        if high <= low:
            break
        winner = pool[high][3]
        ranks = {**after, winner: after[winner] + 1}
        dropped.append((loser, pool[low][2]))
        expanded.append(winner)
        low, high = low + 1, high - 1
    return Exchange(tuple(dropped), tuple(expanded))


#: What the config's name stands for.
POLICY = ElaLoraPolicy
