"""Rank policies that benchmarks choose by the config."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from tsqlora_scale.config.schema import AllocationConfig
from tsqlora_scale.ranks import Plan, Statistics, TsqLoraPolicy


class Doubled:
    """For growth alone: twice the rank everywhere."""

    needs_components: ClassVar[bool] = False

    def __init__(self, _: AllocationConfig) -> None:
        pass

    def plan(self, stats: Statistics) -> Plan:
        """See the class."""
        ranks = {name: 2 * rank for name, rank in stats.ranks.items()}
        return Plan(ranks=ranks, phi=2.0, budget=sum(ranks.values()), sensitivity={}, reasons={})


class UniformInTurn(TsqLoraPolicy):
    """The method's plan where ranks are uniform, and uniform ranks where they are not: every event changes many."""

    def plan(self, stats: Statistics) -> Plan:
        """See the class."""
        plan = super().plan(stats)
        if set(stats.ranks.values()) == {stats.initial_rank}:
            return plan
        return replace(plan, ranks=dict.fromkeys(plan.ranks, stats.initial_rank))
