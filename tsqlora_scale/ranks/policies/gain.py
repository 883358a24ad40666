"""``allocation.policy: gain``: every rank where it lowers the loss most, per parameter if those are paid for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from tsqlora_scale.config.schema import AllocationConfig
from tsqlora_scale.ranks.greedy import Purchase, buy
from tsqlora_scale.ranks.policies.policy import Plan, Statistics
from tsqlora_scale.ranks.policies.tsqlora import normalised, quality_factor


@dataclass(frozen=True)
class GainPolicy:
    """The ranks of the largest worth (:mod:`~tsqlora_scale.ranks.rank_worth`), bought one at a time.

    ``budget: fixed`` spends what :class:`~.tsqlora.TsqLoraPolicy` would, phi R_0. ``budget: auto`` finds the size as
    well: the fewest ranks that leave no more than ``tolerance`` of all worth unbought, of ``ceiling`` times the ranks
    at the start at the most; ranks grow where that pays and shrink where it does not. The plan has the curve.

    What noise alone asks for is worth nothing. Where nothing is worth anything, ranks stay.
    """

    needs_components: ClassVar[bool] = False
    needs_worths: ClassVar[bool] = True

    config: AllocationConfig

    def plan(self, stats: Statistics) -> Plan:
        """See the class; ``r_max: none`` means 4 r_0, with ``budget: auto`` as often as the ceiling has it."""
        cfg = self.config
        finds = cfg.budget == "auto"
        ceiling = most_ranks(cfg, stats.initial_rank)
        costs = stats.costs if cfg.budget_unit == "params" else dict.fromkeys(stats.dims, 1)
        phi = 1.0 if finds else quality_factor(stats.quality, stats.first_quality, cfg.phi_min, cfg.phi_max)
        factor = cfg.ceiling if finds else phi
        budget = max(round(factor * stats.initial_rank * sum(costs.values())), min(costs.values()))
        if not any(gain > 0 for worths in stats.worths.values() for gain in worths):
            reasons = {name: f"nothing is worth a rank, it stays {rank}" for name, rank in stats.ranks.items()}
            return Plan(dict(stats.ranks), phi, budget, normalised(stats.sensitivity), reasons)
        high = {name: min(ceiling, *dims) for name, dims in stats.dims.items()}
        low = {name: min(cfg.r_min, most) for name, most in high.items()}
        # of all that a layer may have in the end, and not of this event's reach: the size is found event by event
        whole = math.fsum(gain for name, most in high.items() for gain in stats.worths[name][:most])
        purchase = partial(
            buy, {name: stats.worths[name] for name in stats.dims}, budget=budget, costs=costs, whole=whole
        )
        at_once = partial(purchase, low=low, high=high, tolerance=cfg.tolerance if finds else None)
        if cfg.max_change is None:
            bought = at_once()
        else:
            # from further away than that, straight to the bound
            nearest, farthest = (
                {name: min(max(stats.ranks[name] + change, low[name]), high[name]) for name in stats.dims}
                for change in (-cfg.max_change, cfg.max_change)
            )
            if finds:  # towards the size that was found, and no layer beyond its own part in it
                wanted = at_once().ranks
                farthest = {name: min(max(wanted[name], nearest[name]), most) for name, most in farthest.items()}
            bought = purchase(low=nearest, high=farthest)
        ranks = bought.ranks if any(bought.ranks.values()) else _dearest(stats)
        return Plan(
            ranks=ranks,
            phi=phi,
            budget=budget,
            sensitivity=normalised(stats.sensitivity),
            reasons=_reasons(stats, ranks, bought),
            curve=bought.curve,
        )


def most_ranks(cfg: AllocationConfig, initial_rank: int) -> int:
    """Most ranks of a layer, before its dimensions."""
    if cfg.r_max is not None:
        return cfg.r_max
    return round(initial_rank * (max(4.0, cfg.ceiling) if cfg.budget == "auto" else 4.0))


def _dearest(stats: Statistics) -> dict[str, int]:
    """One rank, where the first one is worth most: without any there is nothing to train or to score."""
    best = max(stats.dims, key=lambda name: stats.worths[name][:1])
    return {name: int(name == best) for name in stats.dims}


def _reasons(stats: Statistics, ranks: dict[str, int], bought: Purchase) -> dict[str, str]:
    total = sum(sum(worths) for worths in stats.worths.values())
    lines = {}
    for name, rank in ranks.items():
        worths = stats.worths[name]
        last = worths[rank - 1] / total if 0 < rank <= len(worths) else 0.0
        following = worths[rank] / total if rank < len(worths) else 0.0
        lines[name] = (
            f"its last rank is worth {last:.2e} of all, one more {following:.2e}, rank {stats.ranks[name]} -> {rank}"
        )
    return lines


#: What the config's name stands for.
POLICY = GainPolicy
