"""The subset S."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.quality import inclusion_probabilities
from tsqlora_scale.config import SamplingConfig
from tsqlora_scale.quality.rng import share_of
from tsqlora_scale.quality.select import select_subset

TRIALS = 8000


def frequencies(selector: str, log_p: np.ndarray, keep_fraction: float) -> np.ndarray:
    sampling = SamplingConfig(selector=selector, keep_fraction=keep_fraction)
    return np.mean([select_subset(len(log_p), log_p, sampling, seed=seed) for seed in range(TRIALS)], axis=0)


def test_inclusion_probabilities_are_those_of_draws_without_replacement():
    log_p = np.array([1.5, -0.4, 0.3, 0.9, -2.0, 0.0]) / 0.7
    exact = inclusion_probabilities(np.exp(log_p), 3)
    assert np.isclose(exact.sum(), 3)
    found = frequencies("quality", log_p, 0.5)
    np.testing.assert_array_less(np.abs(found - exact), 4.5 * np.sqrt(exact * (1 - exact) / TRIALS) + 1e-12)


def test_random_ignores_quality():
    found = frequencies("random", np.array([9.0, 0.0, 0.0, -9.0]), 0.5)
    np.testing.assert_allclose(found, 0.5, atol=4.5 * 0.5 / TRIALS**0.5)


def test_full_takes_all_whatever_the_fraction():
    assert select_subset(7, None, SamplingConfig(selector="full", keep_fraction=0.1), seed=0).all()


@settings(max_examples=60)
@given(st.integers(1, 200), st.floats(0.01, 1), st.sampled_from(["quality", "random"]), st.integers(0, 2**31 - 1))
def test_size_and_determinism(size, fraction, selector, seed):
    log_p = np.linspace(-4, 4, size)
    sampling = SamplingConfig(selector=selector, keep_fraction=fraction)
    member = select_subset(size, log_p, sampling, seed=seed)
    assert member.dtype == bool
    assert member.shape == (size,)
    assert member.sum() == share_of(fraction, size)
    assert (member == select_subset(size, log_p, sampling, seed=seed)).all()


@pytest.mark.parametrize(
    ("fraction", "total", "expected"), [(0.07, 100, 7), (0.1, 30, 3), (0.1, 31, 4), (1.0, 5, 5), (0.001, 5, 1)]
)
def test_a_share_is_that_of_the_fraction_as_written(fraction, total, expected):
    assert share_of(fraction, total) == expected
