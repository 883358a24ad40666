"""Paired tests against a slow reference, and intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reference.comparison import sign_flip_p
from tsqlora_scale.comparison.estimates import interval, mean_of, paired_p

VALUES = st.lists(st.integers(-50, 50).map(lambda value: value / 16), min_size=2, max_size=7)


@given(VALUES)
def test_p_is_that_of_all_signs(differences: list[float]) -> None:
    assert paired_p(differences) == pytest.approx(sign_flip_p(differences))


@given(VALUES)
def test_p_knows_no_order_and_no_direction(differences: list[float]) -> None:
    assert paired_p(differences) == paired_p([-value for value in reversed(differences)])


def test_the_smallest_p() -> None:
    assert paired_p([0.1, 0.2, 0.3, 0.4, 0.5]) == 2 / 2**5
    assert paired_p([0.0, 0.0, 0.0]) == 1.0
    assert math.isnan(paired_p([0.1]))


def test_no_p_of_what_is_no_number() -> None:
    assert np.isnan(paired_p([0.1, float("nan"), 0.2]))


def test_p_of_many_seeds_is_nearly_that_of_all_signs() -> None:
    differences = list(np.random.default_rng(0).normal(0.4, 1.0, 14))
    assert paired_p(differences) == pytest.approx(sign_flip_p(differences), abs=0.02)


@given(VALUES)
def test_the_mean_is_within_its_interval(values: list[float]) -> None:
    found = mean_of(values)
    assert min(values) <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= max(values)


def test_nothing_that_is_finite_has_no_interval() -> None:
    assert all(map(math.isnan, interval(np.full((3, 1), np.nan), lambda drawn: drawn.mean(axis=(1, 2)))))


def test_an_interval_of_what_often_has_no_value_has_no_ends() -> None:
    """It would be one of the resamples that have a value, and look firmer than it is."""
    samples = np.array([0.2, 0.4, -0.1, 0.3, 0.5])

    def positive(drawn: np.ndarray) -> np.ndarray:
        means = drawn.mean(axis=1)
        return np.where(means > 0.05, means, np.nan)

    assert np.isfinite(interval(samples, positive)).all()
    assert np.isnan(interval(samples - 0.2, positive)).all()
