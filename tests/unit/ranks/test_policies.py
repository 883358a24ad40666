import dataclasses
import threading

import pytest
import torch

from tsqlora_scale.config.schema import AllocationConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.ranks.policies.policy import Plan, PlanMismatch, Statistics, agree
from tsqlora_scale.ranks.policies.tsqlora import TsqLoraPolicy

DIMS = {"a": (16, 16), "b": (16, 64), "c": (64, 16)}


def statistics(**changes) -> Statistics:
    base = Statistics(
        sensitivity={"a": 1.0, "b": 2.0, "c": 1.0},
        ranks=dict.fromkeys(DIMS, 8),
        dims=DIMS,
        initial_rank=8,
        quality=0.6,
        first_quality=0.6,
    )
    return dataclasses.replace(base, **changes)


def test_first_event_spends_the_initial_budget() -> None:
    plan = TsqLoraPolicy(AllocationConfig()).plan(statistics())
    assert plan.phi == 1.0
    assert plan.budget == 24
    assert plan.ranks == {"a": 6, "b": 12, "c": 6}
    assert plan.sensitivity == {"a": 0.25, "b": 0.5, "c": 0.25}
    assert plan.reasons["b"] == "asked 12.00, 12.00 within bounds, rank 8 -> 12"


@pytest.mark.parametrize(("quality", "phi", "budget"), [(0.66, 1.1, 26), (0.1, 0.5, 12), (0.99, 1.5, 36)])
def test_budget_follows_quality_within_its_bounds(quality: float, phi: float, budget: int) -> None:
    plan = TsqLoraPolicy(AllocationConfig()).plan(statistics(quality=quality))
    assert plan.phi == pytest.approx(phi)
    assert plan.budget == budget == sum(plan.ranks.values())


def test_max_change_is_named_where_it_binds() -> None:
    stats = statistics(sensitivity={"a": 1.0, "b": 50.0, "c": 1.0}, ranks={"a": 8, "b": 7, "c": 10})
    plan = TsqLoraPolicy(AllocationConfig(max_change=2)).plan(stats)
    assert plan.ranks == {"a": 7, "b": 9, "c": 8}
    assert "held at max_change, rank 7 -> 9" in plan.reasons["b"]
    assert "held at max_change, rank 10 -> 8" in plan.reasons["c"]


def test_no_layer_exceeds_its_smaller_dimension() -> None:
    stats = statistics(sensitivity={"a": 1000.0, "b": 1.0, "c": 1.0})
    plan = TsqLoraPolicy(AllocationConfig(r_max=32, phi_max=1.5)).plan(stats)
    assert plan.ranks == {"a": 16, "b": 4, "c": 4}
    assert "held at r_max" in plan.reasons["a"]


def test_r_max_is_four_times_the_initial_rank_unless_set() -> None:
    stats = statistics(sensitivity={"a": 1.0, "b": 1000.0, "c": 1.0}, initial_rank=3)
    assert TsqLoraPolicy(AllocationConfig()).plan(stats).ranks["b"] == 7  # 9 - 2 x r_min
    stats = dataclasses.replace(stats, dims={**DIMS, "d": (64, 64), "e": (64, 64), "f": (64, 64)},
                                sensitivity={**stats.sensitivity, "d": 1.0, "e": 1.0, "f": 1.0},
                                ranks=dict.fromkeys("abcdef", 3))  # fmt: skip
    assert TsqLoraPolicy(AllocationConfig()).plan(stats).ranks["b"] == 12


@pytest.mark.parametrize("unit", ["rank", "params"])
def test_with_r_min_0_the_last_adapter_stays(unit: str) -> None:
    config = AllocationConfig(r_min=0, phi_min=1e-3, budget_unit=unit)
    plan = TsqLoraPolicy(config).plan(statistics(initial_rank=1, quality=1e-6))
    assert sum(plan.ranks.values()) == 1
    stats = statistics(sensitivity={"a": 0.0, "b": 5.0, "c": 1.0})
    plan = TsqLoraPolicy(AllocationConfig(r_min=0)).plan(stats)
    assert plan.ranks == {"a": 0, "b": 16, "c": 8}
    assert "held at r_min, rank 8 -> 0" in plan.reasons["a"]


def test_a_budget_in_parameters_is_kept_in_parameters() -> None:
    plan = TsqLoraPolicy(AllocationConfig(budget_unit="params")).plan(statistics())
    costs = {"a": 32, "b": 80, "c": 80}
    assert plan.budget == 8 * sum(costs.values())
    spent = sum(costs[n] * r for n, r in plan.ranks.items())
    assert plan.budget - min(costs.values()) < spent <= plan.budget
    assert plan.ranks["b"] > plan.ranks["c"]


def test_digest_tells_decisions_apart_and_nothing_else() -> None:
    plan = TsqLoraPolicy(AllocationConfig()).plan(statistics())
    same = dataclasses.replace(plan, reasons={}, ranks=dict(reversed(plan.ranks.items())))
    assert plan.digest() == same.digest()
    for change in ({"ranks": {**plan.ranks, "a": 7}}, {"budget": 25}, {"phi": 1.0 + 2**-52}):
        assert plan.digest() != dataclasses.replace(plan, **change).digest()


class ThreadWorld(World):
    """Ranks that are threads; a collective that is not entered by all times out instead of hanging."""

    def __init__(self, rank: int, size: int, box: list, barrier: threading.Barrier) -> None:
        super().__init__(rank, size, torch.device("cpu"))
        self._box, self._barrier = box, barrier

    def gather_objects(self, value):
        self._box[self.rank] = value
        self._barrier.wait(timeout=10)
        values = list(self._box)
        self._barrier.wait(timeout=10)
        return values

    def broadcast(self, value):
        return self.gather_objects(value)[0]


def agree_everywhere(plans: list[Plan]) -> list[object]:
    size = len(plans)
    box, barrier = [None] * size, threading.Barrier(size)
    outcomes: list[object] = [None] * size

    def work(rank: int) -> None:
        try:
            outcomes[rank] = agree(plans[rank], ThreadWorld(rank, size, box, barrier))
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_all_ranks_return_rank_zeros_plan() -> None:
    plan = TsqLoraPolicy(AllocationConfig()).plan(statistics())
    copies = [plan, *(dataclasses.replace(plan, reasons={"rank": str(r)}) for r in (1, 2))]
    assert agree_everywhere(copies) == [plan] * 3
    assert agree(plan, World()) is plan


def test_one_differing_rank_stops_all_of_them() -> None:
    plan = TsqLoraPolicy(AllocationConfig()).plan(statistics())
    other = dataclasses.replace(plan, ranks={**plan.ranks, "a": 1})
    outcomes = agree_everywhere([plan, plan, other, plan])
    assert all(isinstance(outcome, PlanMismatch) for outcome in outcomes)
    assert all("rank(s) 2 of 4 disagree" in str(outcome) for outcome in outcomes)
