"""``allocation.policy: tsqlora``: ranks by sensitivity, a budget by the data's quality (paper 2.3, Eq. 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from tsqlora_scale.config.schema import AllocationConfig
from tsqlora_scale.ranks.allocate import Allocation, allocate
from tsqlora_scale.ranks.policies.policy import Plan, Statistics


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


#: What the config's name stands for.
POLICY = TsqLoraPolicy
