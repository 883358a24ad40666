"""Eq. 6: divide a rank budget among layers in proportion to their sensitivity.

Exact rational arithmetic throughout (:class:`fractions.Fraction`; a float is a rational number), so that the
result is a function of the inputs to the bit: no tolerance decides who gets the last rank. A few hundred
layers take milliseconds.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Limit = Literal["", "r_min", "r_max", "max_change"]


@dataclass(frozen=True)
class Allocation:
    """What every layer asked for, and what it got; mappings in the order of the input.

    ``asked`` is Eq. 6 to the letter, before bounds; ``share`` what the bounds left of it, still fractional;
    ``ranks`` the integers; ``limits`` names the bound that a layer's share sits on, or is empty.
    """

    asked: dict[str, float]
    share: dict[str, float]
    ranks: dict[str, int]
    limits: dict[str, Limit]


def allocate(
    sensitivity: Mapping[str, float],
    *,
    budget: int,
    costs: Mapping[str, int],
    r_min: int,
    r_max: Mapping[str, int],
    before: Mapping[str, int] | None = None,
    max_change: int | None = None,
) -> Allocation:
    """Ranks r_l proportional to S_l within [r_min, r_max[l]], of total cost ``budget``.

    With ``max_change``, within [before - max_change, before + max_change] as well; a layer from which r_min or r_max is
    further away than that goes there all the same.

    Bounds come first, by water-filling: what a clipped layer cannot take goes to the others in proportion.
    Then whole ranks, by largest remainder; ties go to the earlier layer. A layer of S = 0 gets ``r_min``, and
    shares evenly what all others are too full to take; so if every S is zero, the ranks are uniform. An S that
    is negative or not finite counts as zero. When the bounds contradict the budget, the bounds win.

    With unit costs the total is exactly ``budget`` whenever the bounds allow it; a layer of larger S never gets
    less than one of smaller S and equal bounds; and a layer whose S rises, all else equal, never loses rank.
    With other costs the total is at most ``budget``, no layer could take one more rank without exceeding it,
    and a layer never gets less than its share rounded down (which is what stays monotone in S).

    Args:
        sensitivity: S_l by layer; its order is what "earlier" means.
        budget: ranks, or parameters.
        costs: what one rank of a layer costs, in the unit of ``budget``; positive.
        r_min: fewest ranks of a layer; a layer whose ``r_max`` is smaller gets that instead.
        r_max: most ranks, by layer.
        before: ranks now; needed with ``max_change``.
        max_change: most ranks that a layer gains or loses; none: any number.
    """
    names = list(sensitivity)
    cost = [costs[n] for n in names]
    widest = [r_max[n] for n in names]
    lowest = [min(r_min, h) for h in widest]
    low, high = lowest, widest
    if max_change is not None:
        assert before is not None
        bounds = list(zip(names, lowest, widest, strict=True))
        low = [min(max(before[n] - max_change, lo), hi) for n, lo, hi in bounds]
        high = [min(max(before[n] + max_change, lo), hi) for n, lo, hi in bounds]
    weight = [Fraction(s) if math.isfinite(s) and s > 0 else Fraction(0) for s in sensitivity.values()]
    if not any(weight):
        weight = [Fraction(1)] * len(names)
    # Eq. 6 in a budget of any unit: r_l = lambda S_l, with sum of c_l r_l = budget
    level = Fraction(budget) / sum((c * w for c, w in zip(cost, weight, strict=True)), Fraction(0)) if names else 0
    share = _water_fill(weight, cost, low, high, budget)
    ranks = _whole(share, cost, high, budget)
    return Allocation(
        asked={n: float(level * w) for n, w in zip(names, weight, strict=True)},
        share={n: float(x) for n, x in zip(names, share, strict=True)},
        ranks=dict(zip(names, ranks, strict=True)),
        limits={
            n: _limit(x, lo, hi, bounds)
            for n, x, lo, hi, bounds in zip(names, share, low, high, zip(lowest, widest, strict=True), strict=True)
        },
    )


def _limit(share: Fraction, low: int, high: int, bounds: tuple[int, int]) -> Limit:
    """The bound of [low, high] that the share sits on; one that is not of ``bounds`` is ``max_change``'s."""
    if share == high:
        return "r_max" if high == bounds[1] else "max_change"
    if share == low:
        return "r_min" if low == bounds[0] else "max_change"
    return ""


def _water_fill(
    weight: Sequence[Fraction], cost: Sequence[int], low: Sequence[int], high: Sequence[int], budget: int
) -> list[Fraction]:
    """x_l = clip(lambda w_l, low_l, high_l) with sum of c_l x_l = budget, or as near as the bounds allow.

    The cost is piecewise linear and rises with lambda; walk its breakpoints until the budget lies on a piece.
    """
    spent = Fraction(sum(c * lo for c, lo in zip(cost, low, strict=True)))
    if spent >= budget:
        return [Fraction(lo) for lo in low]
    points: list[tuple[Fraction, Fraction]] = []  # (lambda, change of slope there)
    for w, c, lo, hi in zip(weight, cost, low, high, strict=True):
        if w > 0 and hi > lo:
            points += [(lo / w, c * w), (hi / w, -c * w)]
    points.sort()
    slope, level = Fraction(0), Fraction(0)
    for at, change in points:
        gain = slope * (at - level)
        if spent + gain >= budget:
            level += (budget - spent) / slope
            return [_clip(level * w, lo, hi) for w, lo, hi in zip(weight, low, high, strict=True)]
        spent, level, slope = spent + gain, at, slope + change
    # every layer of positive weight is full; those of weight zero share the rest evenly
    floor = [hi if w > 0 else lo for w, lo, hi in zip(weight, low, high, strict=True)]
    rest = [Fraction(hi > lo) for lo, hi in zip(floor, high, strict=True)]
    return _water_fill(rest, cost, floor, high, budget) if any(rest) else [Fraction(hi) for hi in high]


def _clip(value: Fraction, low: int, high: int) -> Fraction:
    return min(max(value, Fraction(low)), Fraction(high))


def _whole(share: Sequence[Fraction], cost: Sequence[int], high: Sequence[int], budget: int) -> list[int]:
    """Largest remainder: round down, then give single ranks to the layers furthest below their share."""
    ranks = [math.floor(x) for x in share]
    left = budget - sum(c * r for c, r in zip(cost, ranks, strict=True))
    queue = [(r - x, i) for i, (x, r) in enumerate(zip(share, ranks, strict=True)) if r < high[i]]
    heapq.heapify(queue)
    while queue and left > 0:
        surplus, i = heapq.heappop(queue)
        if cost[i] > left:
            continue  # and never again: what is left only falls
        ranks[i] += 1
        left -= cost[i]
        if ranks[i] < high[i]:
            heapq.heappush(queue, (surplus + 1, i))
    return ranks
