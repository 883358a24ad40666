"""The subset S."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.quality import inclusion_probabilities
from tsqlora_scale.config.schema import SamplingConfig
from tsqlora_scale.quality.draws.subset import importance_weights, quotas, renormalised, select_subset, share_of

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


@settings(max_examples=60)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any), st.floats(0.01, 1), st.integers(0, 2**31 - 1))
def test_strata_keep_their_shares(sizes, fraction, seed):
    strata = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    total = len(strata)
    log_p = np.random.default_rng(seed).normal(size=total) * 5
    member = select_subset(total, log_p, SamplingConfig(keep_fraction=fraction), seed=seed, strata=strata)
    kept = np.bincount(strata[member], minlength=len(sizes))
    assert kept.sum() == share_of(fraction, total)
    assert (np.abs(kept - np.array(sizes) * kept.sum() / total) < 1).all()
    assert (kept == quotas(np.array(sizes), int(kept.sum()))).all()
    weights = renormalised(np.exp(log_p[member]), strata[member], np.array(sizes))
    assert np.isclose(weights.sum(), 1)
    present = kept > 0
    mass = np.bincount(strata[member], weights, minlength=len(sizes))
    np.testing.assert_allclose(mass[present], np.array(sizes)[present] / np.array(sizes)[present].sum())


def test_in_a_stratum_the_largest_keys_stay():
    log_p, strata = np.array([9.0, 8.0, 7.0, -700.0, -800.0, -900.0]), np.array([0, 0, 0, 1, 1, 1])
    member = select_subset(6, log_p * 100, SamplingConfig(keep_fraction=0.34), seed=0, strata=strata)
    assert member.tolist() == [True, True, False, True, False, False]


@settings(max_examples=60)
@given(st.integers(1, 30), st.integers(0, 2**31 - 1))
def test_importance_weights_make_draws_unbiased(size, seed):
    generator = np.random.default_rng(seed)
    p = generator.dirichlet(np.ones(size) * 0.5) + 1e-9
    p, values = p / p.sum(), generator.normal(size=size)
    np.testing.assert_allclose((p * importance_weights(p, np.inf) * values).sum(), values.mean(), atol=1e-9)
    assert (importance_weights(p, 2.0) == np.minimum(importance_weights(p, np.inf), 2.0)).all()
