"""A policy of one's own: more rank towards the end of the model, whatever the gradients say.

    python launch/train.py --config configs/quickstart.yaml allocation.policy=examples/policy.py:LaterLayers

A policy is pure: every process computes the same plan from the same statistics. Moments, engines, checkpoints and files
follow the ranks by themselves.
"""

from __future__ import annotations

from typing import ClassVar

from tsqlora_scale.config.schema import AllocationConfig
from tsqlora_scale.ranks.allocate import allocate
from tsqlora_scale.ranks.policies.policy import Plan, Statistics


class LaterLayers:
    """Ranks grow linearly with a layer's place, within ``allocation.r_min`` and ``r_max``; the total stays."""

    needs_components: ClassVar[bool] = False

    def __init__(self, config: AllocationConfig) -> None:
        self.config = config

    def plan(self, stats: Statistics) -> Plan:
        """Weights 1, 2, 3, ... in the order of the layers' names, divided as sensitivities are."""
        weights = {name: float(place + 1) for place, name in enumerate(stats.ranks)}
        budget = stats.initial_rank * len(stats.ranks)
        ceiling = self.config.r_max or 4 * stats.initial_rank
        found = allocate(
            weights,
            budget=budget,
            costs=dict.fromkeys(weights, 1),
            r_min=self.config.r_min,
            r_max={name: min(ceiling, *dims) for name, dims in stats.dims.items()},
        )
        total = sum(weights.values())
        return Plan(
            ranks=found.ranks,
            phi=1.0,
            budget=budget,
            sensitivity={name: weight / total for name, weight in weights.items()},
            reasons={name: f"place {int(weight)} of {len(weights)}" for name, weight in weights.items()},
        )
