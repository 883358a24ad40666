"""Ranks bought one at a time, the dearest first: the best division of a budget when values of a layer fall."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass

#: Points of a curve that are kept.
POINTS = 33


@dataclass(frozen=True)
class Purchase:
    """Ranks, and how the worth that is left fell while they were bought.

    Attributes:
        ranks: by layer, in the order of the input.
        curve: (cost so far, share of all worth that is not bought yet), from the least ranks on; of many points some.
        left: that share at the end.
    """

    ranks: dict[str, int]
    curve: tuple[tuple[int, float], ...]
    left: float


def buy(
    worths: Mapping[str, tuple[float, ...]],
    *,
    budget: int,
    costs: Mapping[str, int],
    low: Mapping[str, int],
    high: Mapping[str, int],
    tolerance: float | None = None,
    whole: float | None = None,
) -> Purchase:
    """Ranks of total cost at most ``budget``, each the one worth most for its cost; ties go to the earlier layer.

    With ``tolerance`` buying ends as soon as no more than that share of all worth is left; else the whole budget is
    spent: when nothing of worth is left, on the layers of the lowest ranks. Bounds come first, whatever they cost.

    Args:
        worths: of ranks 1, 2, ... of every layer, falling; what is not there is worth nothing.
        budget: ranks, or parameters.
        costs: of a rank of every layer, in the same unit; positive.
        low: fewest ranks by layer.
        high: most ranks by layer.
        tolerance: in [0, 1).
        whole: all worth, where that is more than is within ``high``.
    """
    names = list(worths)
    ranks = dict(low)
    spent = sum(costs[name] * ranks[name] for name in names)
    total = math.fsum(gain for name in names for gain in worths[name][: high[name]]) if whole is None else whole
    bought = math.fsum(gain for name in names for gain in worths[name][: ranks[name]])

    def worth_of(name: str) -> float:
        return worths[name][ranks[name]] if ranks[name] < len(worths[name]) else 0.0

    def left() -> float:
        return max(1 - bought / total, 0.0) if total > 0 else 0.0

    queue = [(-worth_of(name) / costs[name], place) for place, name in enumerate(names) if ranks[name] < high[name]]
    heapq.heapify(queue)
    curve = [(spent, left())]
    while queue and (tolerance is None or left() > tolerance):
        price, place = heapq.heappop(queue)
        name = names[place]
        if price == 0 and tolerance is None:
            heapq.heappush(queue, (price, place))
            _spread(names, ranks, budget=budget - spent, costs=costs, high=high)
            break
        if price == 0 or spent + costs[name] > budget:
            continue  # and never again: what is left of the budget only falls
        bought += worth_of(name)
        ranks[name] += 1
        spent += costs[name]
        curve.append((spent, left()))
        if ranks[name] < high[name]:
            heapq.heappush(queue, (-worth_of(name) / costs[name], place))
    return Purchase({name: ranks[name] for name in names}, _thinned(curve), left())


def _spread(
    names: list[str], ranks: dict[str, int], *, budget: int, costs: Mapping[str, int], high: Mapping[str, int]
) -> None:
    """What nothing of worth is left for: to the layers of the lowest ranks, in place."""
    queue = [(ranks[name], place) for place, name in enumerate(names) if ranks[name] < high[name]]
    heapq.heapify(queue)
    while queue:
        _, place = heapq.heappop(queue)
        name = names[place]
        if costs[name] > budget:
            continue
        ranks[name] += 1
        budget -= costs[name]
        if ranks[name] < high[name]:
            heapq.heappush(queue, (ranks[name], place))


def _thinned(curve: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """At most :data:`POINTS` points, the first and the last among them."""
    if len(curve) <= POINTS:
        return tuple(curve)
    return tuple(curve[round(i * (len(curve) - 1) / (POINTS - 1))] for i in range(POINTS))
