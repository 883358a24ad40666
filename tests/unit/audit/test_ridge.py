"""Predictions of samples that a regression has not seen, from one decomposition, against one regression for each."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.audit import ridge_without
from tsqlora_scale.audit import ridge
from tsqlora_scale.audit.ridge import PENALTIES, left_out_predictions


def standardised(features: np.ndarray) -> np.ndarray:
    return (features - features.mean(0)) / features.std(0) / features.shape[1] ** 0.5


@pytest.mark.parametrize("crowd", [2, 512])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000), size=st.integers(8, 30), width=st.integers(1, 20), classes=st.integers(1, 3),
    groups=st.integers(4, 30),
)  # fmt: skip
def test_left_out_is_left_out(crowd: int, seed: int, size: int, width: int, classes: int, groups: int) -> None:
    """Groups of more than ``crowd`` by the directions in which they differ, others row by row."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(size, width)).astype(np.float32)
    targets = generator.normal(size=(size, classes))
    of_group = np.append(np.arange(4), generator.integers(0, groups, size - 4))
    with mock.patch.object(ridge, "CROWD", crowd):
        found, penalty = left_out_predictions(features, targets, of_group)
    expected = ridge_without(standardised(features.astype(np.float64)), targets, of_group, penalty)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_a_crowd_of_copies_is_left_out_as_one() -> None:
    """Thousands of equal texts, whose features differ by rounding."""
    generator = np.random.default_rng(1)
    features = generator.normal(size=(900, 40)).astype(np.float32)
    features[:700] = features[0] * (1 + 1e-7 * generator.normal(size=(700, 1)).astype(np.float32))
    targets = np.concatenate([np.full((700, 1), 3.0), features[700:, :1] + 0.1 * generator.normal(size=(200, 1))])
    of_group = np.append(np.zeros(700, dtype=np.int64), np.arange(1, 201))
    found, penalty = left_out_predictions(features, targets, of_group)
    expected = ridge_without(standardised(features.astype(np.float64)), targets, of_group, penalty)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_the_penalty_is_the_best_one() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(40, 6)).astype(np.float32)
    targets = features[:, :1] + generator.normal(size=(40, 1))
    _, penalty = left_out_predictions(features, targets, np.arange(40))
    errors = [
        ((ridge_without(standardised(features.astype(np.float64)), targets, np.arange(40), p) - targets) ** 2).mean()
        for p in PENALTIES
    ]
    assert penalty == PENALTIES[int(np.argmin(errors))]


def test_samples_that_are_not_learned_from_are_predicted_without_their_copies() -> None:
    generator = np.random.default_rng(1)
    features = generator.normal(size=(60, 5)).astype(np.float32)
    features[50:] = features[:10]
    targets = generator.normal(size=(60, 2))
    fitted = np.arange(60) < 50
    groups = np.append(np.arange(50), np.arange(10))
    found, penalty = left_out_predictions(features, targets, groups, fitted=fitted)
    known = features[:50].astype(np.float64)
    middle, spread = known.mean(0), known.std(0)
    for row in (3, 53):
        kept = np.arange(50) != 3
        plain = (np.vstack([known[kept], known[3:4]]) - middle) / spread / 5**0.5
        design = np.column_stack([plain[:-1], np.ones(49)])
        ridge = np.diag([penalty * 50] * 5 + [0.0])
        weights = np.linalg.solve(design.T @ design + ridge, design.T @ targets[:50][kept])
        np.testing.assert_allclose(found[row], np.append(plain[-1], 1.0) @ weights, atol=1e-6)


@pytest.mark.parametrize("size", [6, 40])
def test_features_that_do_not_vary(size: int) -> None:
    features = np.ones((size, 10), dtype=np.float32)
    features[:, 3] = np.arange(size)
    targets = np.arange(size, dtype=float)[:, None]
    found, _ = left_out_predictions(features, targets, np.arange(size))
    assert np.isfinite(found).all()
    assert np.corrcoef(found[:, 0], targets[:, 0])[0, 1] > 0.99
