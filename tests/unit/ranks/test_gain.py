"""What a rank is worth, and ranks that are bought by it."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import ranks as reference
from tests.unit.ranks.models import adapted, padded_batch
from tests.unit.ranks.trackers import make_tracker, train_step
from tsqlora_scale.config.schema import AllocationConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.ranks.greedy import POINTS, buy
from tsqlora_scale.ranks.policies.gain import GainPolicy
from tsqlora_scale.ranks.policies.policy import Statistics
from tsqlora_scale.ranks.rank_worth import held_part, rank_worths, step_length

NAMES = ("a", "b", "c")
FALLING = st.lists(st.floats(0, 10), min_size=0, max_size=3).map(lambda values: tuple(sorted(values, reverse=True)))


def bought(
    worths: list[tuple[float, ...]], budget: int, *, low: int = 0, high: int = 3, costs: tuple[int, ...] = (1,) * 3,
    tolerance: float | None = None,
):  # fmt: skip
    return buy(
        dict(zip(NAMES, worths, strict=True)),
        budget=budget,
        costs=dict(zip(NAMES, costs, strict=True)),
        low=dict.fromkeys(NAMES, low),
        high=dict.fromkeys(NAMES, high),
        tolerance=tolerance,
    )


@given(st.lists(FALLING, min_size=3, max_size=3), st.integers(0, 12), st.integers(0, 1))
def test_no_other_ranks_of_the_budget_are_worth_more(worths: list[tuple[float, ...]], budget: int, low: int) -> None:
    budget = max(budget, 3 * low)
    found = bought(worths, budget, low=low)
    got = sum(sum(values[: found.ranks[name]]) for name, values in zip(NAMES, worths, strict=True))
    best = reference.best_division(worths, (1,) * 3, (low,) * 3, (3,) * 3, budget)
    assert got == pytest.approx(best, abs=1e-9)
    assert sum(found.ranks.values()) == min(budget, 9), "the whole budget is spent"
    assert all(first[1] >= second[1] for first, second in pairwise(found.curve))


@given(st.lists(FALLING, min_size=3, max_size=3), st.floats(0, 0.9))
def test_the_fewest_ranks_that_leave_no_more_than_the_tolerance(
    worths: list[tuple[float, ...]], tolerance: float
) -> None:
    found = bought(worths, 99, tolerance=tolerance)
    total = math.fsum(map(math.fsum, worths))
    spent = sum(found.ranks.values())
    if total > 0:
        assert found.left <= tolerance + 1e-12
        if spent:
            fewer = reference.best_division(worths, (1,) * 3, (0,) * 3, (3,) * 3, spent - 1)
            assert 1 - fewer / total > tolerance - 1e-12
    else:
        assert spent == 0


@given(st.lists(FALLING, min_size=3, max_size=3), st.integers(0, 30), st.tuples(*[st.integers(1, 5)] * 3))
def test_parameters_are_kept_to(worths: list[tuple[float, ...]], budget: int, costs: tuple[int, ...]) -> None:
    found = bought(worths, budget, costs=costs)
    spent = sum(cost * found.ranks[name] for name, cost in zip(NAMES, costs, strict=True))
    assert spent <= budget
    assert all(found.ranks[n] == 3 or spent + cost > budget for n, cost in zip(NAMES, costs, strict=True))


def test_what_nothing_of_worth_is_left_for_goes_to_the_lowest_ranks() -> None:
    found = bought([(5.0, 4.0), (1.0,), ()], 7)
    assert found.ranks == {"a": 3, "b": 2, "c": 2}
    assert found.left == 0.0


def test_a_curve_is_short_and_has_its_ends() -> None:
    found = buy({"a": tuple(1.0 / (i + 1) for i in range(200))}, budget=200, costs={"a": 3}, low={"a": 1},
                high={"a": 200}, tolerance=None)  # fmt: skip
    assert len(found.curve) <= POINTS
    assert found.curve[0][0] == 3
    assert found.curve[-1] == (3 * found.ranks["a"], found.left)


@pytest.mark.parametrize("wide", [False, True])
def test_worth_is_the_squared_singular_values_of_the_target(wide: bool) -> None:
    """With a projection that loses nothing, and no noise between the halves."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (6, 20), "b": (12, 8)} if wide else {"a": (5, 5), "b": (6, 6)}
    learned = {n: torch.randn(o, 2, generator=generator) @ torch.randn(2, i, generator=generator)
               for n, (o, i) in shapes.items()}  # fmt: skip
    gradients = {n: torch.randn(o, i, generator=generator) for n, (o, i) in shapes.items()}
    # rows of length sqrt(d_out), at right angles
    omega = {
        n: math.sqrt(o) * torch.linalg.qr(torch.randn(o, o, generator=generator)).Q for n, (o, _) in shapes.items()
    }
    held = {n: (omega[n] @ learned[n]).double() for n in shapes}
    halves = {n: (omega[n] @ gradients[n], omega[n] @ gradients[n]) for n in shapes}
    # the sketches' norms are those of the matrices, times the rows
    eta = math.sqrt(
        sum(o * float(learned[n].square().sum()) for n, (o, _) in shapes.items())
        / sum(o * float(gradients[n].square().sum()) for n, (o, _) in shapes.items())
    )
    assert step_length(held, halves) == pytest.approx(eta, rel=1e-5)
    for name, worths in rank_worths(held, halves).items():
        expected = reference.target_values(learned[name], gradients[name], eta)
        assert worths[: len(expected)] == pytest.approx(expected, rel=1e-3)


def test_noise_is_worth_little_and_a_signal_below_it_is_found() -> None:
    """Two halves of independent noise, and a signal of one rank in one of two layers."""
    generator = torch.Generator().manual_seed(1)
    noise = {name: [torch.randn(16, 300, generator=generator) for _ in range(2)] for name in "ab"}
    signal = 40 * torch.outer(*(torch.nn.functional.normalize(torch.randn(n, generator=generator), dim=0)
                                for n in (16, 300)))  # fmt: skip
    halves = {"a": (noise["a"][0] + signal, noise["a"][1] + signal), "b": (noise["b"][0], noise["b"][1])}
    worths = rank_worths({name: torch.zeros(16, 300) for name in "ab"}, halves)
    assert worths["a"][0] == pytest.approx(1600 / 16, rel=0.35)
    assert sum(worths["b"]) < 0.02 * worths["a"][0]
    # the noise's own singular values are of the signal's size
    assert float(torch.linalg.svdvals(noise["b"][0])[0]) > 0.45 * 40


def test_what_is_held_is_worth_its_singular_values_where_no_gradient_is_left() -> None:
    b, a = torch.randn(30, 3), torch.randn(3, 20)
    held = held_part(torch.eye(30) * math.sqrt(30), a, b, 2.0)
    zeros = torch.zeros(30, 20)
    found = rank_worths({"x": held}, {"x": (zeros, zeros)})["x"]
    expected = torch.linalg.svdvals(2 * b.double() @ a.double()).square().tolist()
    assert found[:4] == pytest.approx(expected[:4], rel=1e-4, abs=1e-9)


DIMS = {"a": (16, 16), "b": (16, 64)}


def statistics(worths: dict[str, tuple[float, ...]], **changes) -> Statistics:
    base = Statistics(
        sensitivity={"a": 1.0, "b": 3.0}, ranks={"a": 4, "b": 4}, dims=DIMS, initial_rank=4, quality=0.6,
        first_quality=0.6, worths=worths,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


WORTHS = {"a": (8.0, 1.0, 0.5, 0.1), "b": (6.0, 5.0, 4.0, 3.0, 2.0, 1.0)}


def test_the_budget_goes_where_the_worth_is() -> None:
    plan = GainPolicy(AllocationConfig(policy="gain")).plan(statistics(WORTHS))
    assert plan.ranks == {"a": 2, "b": 6}
    assert plan.sensitivity == {"a": 0.25, "b": 0.75}
    assert plan.budget == 8
    assert "rank 4 -> 6" in plan.reasons["b"]


def test_quality_scales_the_budget_as_under_the_methods_own_rule() -> None:
    plan = GainPolicy(AllocationConfig(policy="gain")).plan(statistics(WORTHS, quality=0.75))
    assert plan.phi == pytest.approx(1.25)
    assert sum(plan.ranks.values()) == 10


def test_parameters_count_where_they_are_the_unit() -> None:
    plan = GainPolicy(AllocationConfig(policy="gain", budget_unit="params")).plan(statistics(WORTHS))
    assert plan.budget == 4 * (32 + 80)
    # per parameter a's first two ranks come before b's fourth
    assert plan.ranks["a"] > 2
    assert sum(rank * sum(DIMS[name]) for name, rank in plan.ranks.items()) <= plan.budget


def test_bounds_and_changes_bind() -> None:
    cfg = AllocationConfig(policy="gain", r_min=3, max_change=1)
    assert GainPolicy(cfg).plan(statistics(WORTHS)).ranks == {"a": 3, "b": 5}
    cfg = AllocationConfig(policy="gain", r_max=5)
    assert GainPolicy(cfg).plan(statistics(WORTHS)).ranks == {"a": 3, "b": 5}


def test_the_size_is_found_and_kept_below_its_ceiling() -> None:
    cfg = AllocationConfig(policy="gain", budget="auto", tolerance=0.3)
    plan = GainPolicy(cfg).plan(statistics(WORTHS))
    assert plan.ranks == {"a": 1, "b": 3}  # 23 of 30.6
    assert plan.curve[0] == (2, pytest.approx(1 - 14 / 30.6))
    assert plan.curve[-1][1] <= 0.3
    low = GainPolicy(AllocationConfig(policy="gain", budget="auto", tolerance=0.0, ceiling=0.5)).plan(
        statistics(WORTHS)
    )
    assert sum(low.ranks.values()) == 4


def test_a_size_that_is_found_in_small_steps_is_the_same() -> None:
    """One strong direction and a long tail: what is left is of all worth, not of what one event can reach."""
    worths = {"a": (10.0, 1.0, *[0.9] * 22), "b": (1.0, *[0.01] * 23)}
    cfg = AllocationConfig(policy="gain", budget="auto", tolerance=0.1, ceiling=24, r_max=24)
    dims = {"a": (64, 64), "b": (64, 64)}
    stats = statistics(worths, ranks={"a": 1, "b": 3}, dims=dims, initial_rank=2)
    at_once = GainPolicy(cfg).plan(stats)
    ranks, plans = stats.ranks, []
    for _ in range(30):
        stats = dataclasses.replace(stats, ranks=ranks)
        plans.append(GainPolicy(cfg.model_copy(update={"max_change": 1})).plan(stats))
        assert all(abs(plans[-1].ranks[name] - ranks[name]) <= 1 for name in ranks)
        assert plans[-1].ranks["b"] <= ranks["b"], "which is worth nothing more"
        ranks = plans[-1].ranks
    assert ranks == at_once.ranks and ranks["a"] > 15 and ranks["b"] == 1
    assert plans[0].curve[-1][1] > 0.5, "of two ranks"
    assert plans[-1].curve[-1][1] <= 0.1


def test_ranks_stay_where_nothing_is_worth_anything() -> None:
    plan = GainPolicy(AllocationConfig(policy="gain")).plan(
        statistics({"a": (0.0,), "b": (0.0,)}, ranks={"a": 2, "b": 6})
    )
    assert plan.ranks == {"a": 2, "b": 6}


def test_the_last_adapter_stays() -> None:
    cfg = AllocationConfig(policy="gain", budget="auto", tolerance=0.99, r_min=0)
    assert GainPolicy(cfg).plan(statistics({"a": (1.0,), "b": (1.5,)})).ranks == {"a": 0, "b": 1}


@pytest.mark.parametrize("every", [1, 3])
def test_halves_are_of_alternate_steps(tmp_path, every: int) -> None:
    model = adapted("bert", tmp_path)
    batches = [padded_batch("bert", seed=number) for number in range(4)]
    tracker = make_tracker(every=every, beta=0.5, sketch_seed=3, halves=True)
    tracker.attach(model)
    single = []
    for number, batch in enumerate(batches):
        train_step(tracker, model, [batch], step=every * number)
        one = make_tracker(sketch_seed=3)
        one.attach(model)
        train_step(one, model, [batch])
        one.detach()
        one.reduce(World())
        single.append(one.sketches())
        model.zero_grad()
    tracker.reduce(World())
    for name, (first, second) in tracker.halves().items():
        # beta 0: a single step is in its average whole; of a mean of two the later one counts twice
        assert torch.allclose(first, (single[0][name] + 2 * single[2][name]) / 3, rtol=1e-4, atol=1e-7)
        assert torch.allclose(second, (single[1][name] + 2 * single[3][name]) / 3, rtol=1e-4, atol=1e-7)
    again = make_tracker(every=every, beta=0.5, sketch_seed=3, halves=True)
    again.attach(model)
    again.load_state_dict(tracker.state_dict())
    for name, pair in again.halves().items():
        assert all(torch.equal(a, b) for a, b in zip(pair, tracker.halves()[name], strict=True))
