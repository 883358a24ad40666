"""Paired differences: against a loop over resamples, and how often the interval holds the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.advice import resampled
from tsqlora_scale.advice.paired import Difference, drawn_rows, resampled_means

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
    assert not (found.is_above and turned.is_above)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator, held = np.random.default_rng(0), 0
    for seed in range(200):
        rows = generator.normal(0.3, 1.0, 64)
        found = Difference.paired(rows, np.zeros(64), seed=seed)
        held += found.low <= 0.3 <= found.high
    assert 0.82 <= held / 200 <= 0.97


def test_one_row_is_no_interval() -> None:
    assert Difference.paired(np.array([2.0]), np.array([1.5]), seed=0).rounded() == pytest.approx([0.5, 0.5, 0.5])
