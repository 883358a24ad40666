import math
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.reference import ranks as reference
from tsqlora_scale.ranks.allocate import Allocation, allocate

POSITIVE = st.floats(1e-6, 1e6)
ANY_S = st.one_of(POSITIVE, st.just(0.0), st.floats(1e-300, 1e300))


def run(values: list[float], budget: int, r_min: int = 1, r_max: int | list[int] = 64,
        costs: list[int] | None = None, before: list[int] | None = None,
        max_change: int | None = None) -> Allocation:  # fmt: skip
    names = [f"layer{i}" for i in range(len(values))]
    high = r_max if isinstance(r_max, list) else [r_max] * len(values)
    return allocate(
        dict(zip(names, values, strict=True)),
        budget=budget,
        costs=dict(zip(names, costs or [1] * len(values), strict=True)),
        r_min=r_min,
        r_max=dict(zip(names, high, strict=True)),
        before=None if before is None else dict(zip(names, before, strict=True)),
        max_change=max_change,
    )


def ranks(*args, **kwargs) -> list[int]:
    return list(run(*args, **kwargs).ranks.values())


def test_shares_are_proportional_to_sensitivity() -> None:
    assert ranks([1.0, 2.0, 5.0], budget=16) == [2, 4, 10]


def test_what_a_full_layer_cannot_take_goes_to_the_others_in_proportion() -> None:
    result = run([100.0, 1.0, 3.0], budget=20, r_max=8)
    assert list(result.ranks.values()) == [8, 4, 8]  # 12 are left for 1 : 3, and 9 of them are too many
    assert result.limits == {"layer0": "r_max", "layer1": "", "layer2": "r_max"}
    assert result.asked["layer0"] == pytest.approx(20 * 100 / 104)


def test_what_r_min_gives_comes_from_the_others_in_proportion() -> None:
    assert ranks([0.001, 1.0, 2.0], budget=15, r_min=3) == [3, 4, 8]


def test_remainder_ties_go_to_the_earlier_layer() -> None:
    assert ranks([1.0] * 4, budget=6) == [2, 2, 1, 1]


@pytest.mark.parametrize("values", [[0.0] * 4, [math.nan] * 4, [math.inf, -1.0, math.nan, 0.0]])
def test_without_any_usable_sensitivity_ranks_are_uniform(values: list[float]) -> None:
    assert ranks(values, budget=16) == [4] * 4


def test_a_silent_layer_gets_r_min_unless_all_others_are_full() -> None:
    assert ranks([math.nan, 1.0, 1.0], budget=9) == [1, 4, 4]
    assert ranks([math.nan, 1.0, 0.0], budget=20, r_max=8) == [6, 8, 6]


@pytest.mark.parametrize(("budget", "expected"), [(2, [1, 1, 1]), (100, [4, 4, 4])])
def test_bounds_win_over_an_impossible_budget(budget: int, expected: list[int]) -> None:
    assert ranks([1.0, 2.0, 3.0], budget=budget, r_max=4) == expected


@settings(max_examples=150)
@given(st.lists(POSITIVE, min_size=1, max_size=4), st.data())
def test_equals_brute_force(values: list[float], data: st.DataObject) -> None:
    r_min = data.draw(st.integers(0, 2))
    high = data.draw(st.lists(st.integers(max(r_min, 1), 6), min_size=len(values), max_size=len(values)))
    budget = data.draw(st.integers(r_min * len(values), sum(high)))
    result = run(values, budget, r_min, high)
    shares = reference.water_level(values, [1] * len(values), r_min, high, budget)
    assert list(result.share.values()) == pytest.approx(shares, abs=1e-6)
    fractions = sorted(x % 1 for x in shares)
    # the reference's bisection cannot tell ties from near ties
    assume(all(b - a > 1e-6 for a, b in pairwise([0.0, *fractions, 1.0]) if a > 1e-9 and b < 1 - 1e-9))
    assert list(result.ranks.values()) == reference.nearest_ranks(shares, r_min, high, budget)


@given(st.lists(ANY_S, min_size=1, max_size=40), st.data())
def test_total_is_exact_within_bounds_and_deterministic(values: list[float], data: st.DataObject) -> None:
    r_min, r_max = data.draw(st.tuples(st.integers(0, 3), st.integers(3, 12)))
    budget = data.draw(st.integers(0, 14 * len(values)))
    result = run(values, budget, r_min, r_max)
    assert sum(result.ranks.values()) == min(max(budget, r_min * len(values)), r_max * len(values))
    assert all(r_min <= r <= r_max for r in result.ranks.values())
    assert all(abs(result.ranks[n] - result.share[n]) < 1 for n in result.ranks)
    assert result == run(values, budget, r_min, r_max)


@given(st.lists(ANY_S, min_size=2, max_size=12), st.integers(0, 80), st.data())
def test_more_sensitivity_never_means_less_rank(values: list[float], budget: int, data: st.DataObject) -> None:
    before = ranks(values, budget, 1, 8)
    for i, one in enumerate(values):
        assert all(before[i] >= before[j] for j, other in enumerate(values) if one > other or (one == other and i < j))
    i = data.draw(st.integers(0, len(values) - 1))
    raised = [*values]
    raised[i] = max(values[i], data.draw(ANY_S))
    assert ranks(raised, budget, 1, 8)[i] >= before[i]


@given(st.lists(st.tuples(ANY_S, st.integers(1, 50)), min_size=1, max_size=12), st.integers(0, 2000))
def test_in_parameters_nothing_more_would_fit(layers: list[tuple[float, int]], budget: int) -> None:
    values, costs = [s for s, _ in layers], [c for _, c in layers]
    result = run(values, budget, 1, 16, costs)
    got = list(result.ranks.values())
    assert all(1 <= r <= 16 for r in got)
    spent = sum(c * r for c, r in zip(costs, got, strict=True))
    if budget >= sum(costs):
        assert spent <= budget
    assert all(spent + c > budget for c, r in zip(costs, got, strict=True) if r < 16)
    assert all(r >= math.floor(x + 1e-9) for r, x in zip(got, result.share.values(), strict=True))


def test_max_change_bounds_gains_and_losses_and_the_others_take_the_rest() -> None:
    result = run([100.0, 10.0, 0.1, 8.0], budget=32, r_max=20, before=[8, 8, 8, 8], max_change=3)
    assert list(result.ranks.values()) == [11, 9, 5, 7]
    assert result.limits == {"layer0": "max_change", "layer1": "", "layer2": "max_change", "layer3": ""}
    held = run([100.0, 1.0, 1.0], budget=12, r_max=6, before=[4, 4, 4], max_change=3)
    assert (held.ranks["layer0"], held.limits["layer0"]) == (6, "r_max"), "the nearer bound is named"
    assert ranks([1.0, 1.0], budget=8, r_max=4, before=[9, 0], max_change=2) == [4, 2], "r_max wins, from outside too"


@given(st.lists(st.tuples(ANY_S, st.integers(0, 12)), min_size=1, max_size=20), st.integers(0, 200), st.integers(1, 12))
def test_with_max_change_the_budget_is_met_whenever_bounds_allow(
    layers: list[tuple[float, int]], budget: int, change: int
) -> None:
    before = [r for _, r in layers]
    result = run([s for s, _ in layers], budget, 0, 12, before=before, max_change=change)
    low, high = [max(r - change, 0) for r in before], [min(r + change, 12) for r in before]
    got = list(result.ranks.values())
    assert all(lo <= r <= hi for lo, r, hi in zip(low, got, high, strict=True))
    assert sum(got) == min(max(budget, sum(low)), sum(high))
    if change == 12:
        assert got == ranks([s for s, _ in layers], budget, 0, 12)


def test_in_parameters_equal_sensitivity_means_equal_rank() -> None:
    assert ranks([2.0, 2.0, 2.0], budget=8 * (30 + 10 + 20), costs=[30, 10, 20]) == [8, 8, 8]
