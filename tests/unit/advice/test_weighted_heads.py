"""Weighted heads: against a fit a row, and what weights must mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.advice import weighted_left_out, weighted_ridge
from tsqlora_scale.audit.trial_step import with_warmup_of
from tsqlora_scale.config.train_section import TrainConfig
from tsqlora_scale.quality.query.feature_heads import RIDGES, fit_heads
from tsqlora_scale.run.lr_schedule import learning_rate


def drawn(seed: int, rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(rows, 2, width))
    return features, generator.normal(size=(rows, 2)), generator.uniform(0.05, 2.0, rows)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(4, 12), width=st.integers(1, 14))
def test_a_row_is_predicted_by_the_weighted_fit_to_all_others(seed: int, rows: int, width: int) -> None:
    features, targets, weights = drawn(seed, rows, width)
    heads, left_out = fit_heads(features, targets, weights=weights)
    np.testing.assert_allclose(left_out, weighted_left_out(features, targets, weights, heads.ridge), atol=1e-6)
    whole = [weighted_ridge(features[:, layer], targets, weights, heads.ridge) for layer in range(2)]
    expected = np.mean([features[:, layer] @ slopes + bias for layer, (slopes, bias) in enumerate(whole)], axis=0)
    np.testing.assert_allclose(heads.scores(features), expected, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(5, 12), width=st.integers(1, 14), kinds=st.integers(3, 4))
def test_weighted_copies_are_left_out_together(seed: int, rows: int, width: int, kinds: int) -> None:
    features, targets, weights = drawn(seed, rows, width)
    copies = np.arange(rows) % kinds
    features = features[copies]
    heads, left_out = fit_heads(features, targets, weights=weights, copies=copies)
    expected = weighted_left_out(features, targets, weights, heads.ridge, copies)
    np.testing.assert_allclose(left_out, expected, atol=1e-6)


def test_equal_weights_are_none() -> None:
    features, targets, _ = drawn(0, 20, 5)
    heads, left_out = fit_heads(features, targets)
    again, left_out_again = fit_heads(features, targets, weights=np.ones(20))
    np.testing.assert_allclose(left_out_again, left_out, atol=1e-10)
    assert again.ridge == heads.ridge


def test_a_row_of_weight_two_is_two_rows() -> None:
    features, targets, _ = drawn(1, 9, 3)
    twice = np.concatenate([features, features[:1]]), np.concatenate([targets, targets[:1]])
    judged = np.arange(1, 9)
    heads, _ = fit_heads(features, targets, weights=np.array([2.0, *[1.0] * 8]), judged=judged)
    other, _ = fit_heads(*twice, judged=judged)
    np.testing.assert_allclose(heads.scores(features), other.scores(features), atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_the_judged_rows_choose_the_ridge(seed: int) -> None:
    features, targets, weights = drawn(seed, 30, 4)
    targets[:10, 0] = 50 * features[:10].sum((1, 2))
    judged = np.arange(10, 30)
    heads, _ = fit_heads(features, targets, weights=weights, judged=judged)
    errors = [np.square(weighted_left_out(features, targets, weights, r) - targets)[judged].mean() for r in RIDGES]
    assert heads.ridge == RIDGES[int(np.argmin(errors))]


def test_a_trial_warms_up_for_the_share_that_the_run_would() -> None:
    """A warm-up of so many steps would be most of a trial, which would then learn nothing."""
    train = TrainConfig(max_steps=4500, lr_warmup=500)
    assert with_warmup_of(train, 4500, 4500) == train
    short = with_warmup_of(train, 4500, 60)
    assert short.lr_warmup == 6
    assert learning_rate(short, 6, 60) > 0.98 * train.lr
    assert with_warmup_of(TrainConfig(max_steps=100, lr_warmup=0.1), 100, 60).lr_warmup == 6
