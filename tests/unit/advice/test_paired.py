"""Paired differences: against a loop over resamples, and how often the interval holds the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.advice import resampled
from tsqlora_scale.advice.paired import Difference, Gain, drawn_rows, resampled_means

values = st.lists(st.floats(-10, 10), min_size=1, max_size=12)


@settings(max_examples=5, deadline=None)
@given(values=values, seed=st.integers(0, 100))
def test_means_are_those_of_a_loop(values: list[float], seed: int) -> None:
    drawn = drawn_rows(len(values), seed=seed)
    assert drawn.shape == (4000, len(values))
    np.testing.assert_allclose(resampled_means(np.array(values), seed=seed), resampled(values, drawn.tolist()))


@settings(max_examples=20, deadline=None)
@given(values=values, shift=st.floats(-3, 3), seed=st.integers(0, 100))
def test_what_both_have_in_common_does_not_count(values: list[float], shift: float, seed: int) -> None:
    rows = np.array(values)
    found = Difference.paired(rows + shift, rows, seed=seed)
    np.testing.assert_allclose([found.mean, found.low, found.high], shift, atol=1e-9)
    turned = Difference.paired(rows, rows + shift, seed=seed)
    assert not (Gain(found).is_above and Gain(turned).is_above)
    assert Gain(found).is_above == (shift > 1e-6) or abs(shift) <= 1e-6


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator, held = np.random.default_rng(0), 0
    for seed in range(200):
        rows = generator.normal(0.3, 1.0, 64)
        found = Difference.paired(rows, np.zeros(64), seed=seed)
        held += found.low <= 0.3 <= found.high
    assert 0.82 <= held / 200 <= 0.97


def test_one_row_is_no_interval() -> None:
    assert Difference.paired(np.array([2.0]), np.array([1.5]), seed=0).rounded() == pytest.approx([0.5, 0.5, 0.5])


UP, RATHER_UP, LEVEL = Difference(0.2, 0.1, 0.3), Difference(0.1, -0.1, 0.2), Difference(0.0, -0.1, 0.1)
RATHER_DOWN, DOWN = Difference(-0.1, -0.2, 0.1), Difference(-0.2, -0.3, -0.1)


@pytest.mark.parametrize(
    ("nats", "points", "expected"),
    [
        (UP, None, (True, False, True)),
        (RATHER_UP, None, (False, False, True)),
        (LEVEL, None, (False, False, False)),
        (DOWN, None, (False, True, False)),
        (RATHER_UP, UP, (True, False, True)),
        (LEVEL, UP, (True, False, True)),
        (RATHER_DOWN, UP, (False, False, False)),
        (DOWN, UP, (False, False, False)),
        (LEVEL, DOWN, (False, True, False)),
        (RATHER_DOWN, LEVEL, (False, False, False)),
    ],
)
def test_either_measure_may_be_plain_and_none_may_speak_against(
    nats: Difference, points: Difference | None, expected: tuple[bool, bool, bool]
) -> None:
    found = Gain(nats, points)
    assert (found.is_above, found.is_below, found.leans_up) == expected
