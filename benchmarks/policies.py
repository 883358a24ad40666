"""Rank policies that benchmarks choose by the config."""

from __future__ import annotations

import random
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


class Reversed(TsqLoraPolicy):
    """A control: the method's plan of sensitivities that the layers have the other way round, the least sensitive one
    that of the most sensitive."""

    def plan(self, stats: Statistics) -> Plan:
        """See the class."""
        by_value = sorted(stats.sensitivity, key=lambda name: (stats.sensitivity[name], name))
        return super().plan(_with_those_of(stats, by_value, by_value[::-1]))


class Shuffled(TsqLoraPolicy):
    """A control: the method's plan of sensitivities that are dealt to the layers at random, at every event and in every
    run alike."""

    def plan(self, stats: Statistics) -> Plan:
        """See the class."""
        names = list(stats.sensitivity)
        return super().plan(_with_those_of(stats, names, random.Random(0).sample(names, k=len(names))))


def _with_those_of(stats: Statistics, names: list[str], others: list[str]) -> Statistics:
    """The same with the sensitivities of ``others`` in the place of those of ``names``."""
    whose = dict(zip(names, others, strict=True))
    return replace(stats, sensitivity={name: stats.sensitivity[whose[name]] for name in stats.sensitivity})
