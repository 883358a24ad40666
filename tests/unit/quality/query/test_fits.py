"""Closed-form and convex fits against refits, Newton's method and plain descent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import query as slow
from tsqlora_scale.quality.query import feature_heads
from tsqlora_scale.quality.query.feature_heads import fit_heads
from tsqlora_scale.quality.query.fits import folds_of, log_linear, logistic

#: rows, layers, features, outputs: fewer features than rows, more, and as many
SHAPES = [(12, 2, 5, 3), (9, 3, 20, 2), (8, 1, 8, 1)]


def problem(shape: tuple[int, int, int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rows, layers, width, outputs = shape
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((rows, layers, width)) + 3
    if outputs == 1:
        return features, features[:, 0, :1] * 2 + rng.standard_normal((rows, 1))
    return features, np.eye(outputs)[rng.integers(0, outputs, rows)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_predicted_by_the_fit_to_all_others(
    shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_heads, "RIDGES", (0.3, 3.0, 30.0, 300.0))
    features, targets = problem(shape)
    heads, held_out = fit_heads(features, targets)
    assert heads.ridge == slow.best_ridge(features, targets, feature_heads.RIDGES)
    np.testing.assert_allclose(held_out, slow.left_out(features, targets, heads.ridge), atol=1e-9)
    new = np.random.default_rng(5).standard_normal((4, *features.shape[1:]))
    fits = [slow.ridge(features[:, layer], targets, heads.ridge) for layer in range(features.shape[1])]
    wanted = np.mean([new[:, layer] @ weights + bias for layer, (weights, bias) in enumerate(fits)], axis=0)
    np.testing.assert_allclose(heads.scores(new), wanted, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_copies_are_left_out_together(shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_heads, "RIDGES", (0.3, 3.0, 30.0, 300.0))
    features, targets = problem(shape)
    copies = np.arange(len(features)) % (len(features) - 3) + 40
    features = features[copies - 40]
    heads, held_out = fit_heads(features, targets, copies=copies)
    np.testing.assert_allclose(held_out, slow.left_out(features, targets, heads.ridge, copies), atol=1e-9)
    plain, alone = fit_heads(features, targets)
    assert np.abs(alone - held_out)[:3].max() > 1e-3, "a copy tells"
    none, as_plain = fit_heads(features, targets, copies=np.arange(len(features)))
    assert none.ridge == plain.ridge
    np.testing.assert_array_equal(as_plain, alone)
    monkeypatch.setattr(feature_heads, "RIDGES", (30.0,))
    (heads, held_out), (plain, alone) = (fit_heads(features, targets, copies=given) for given in (copies, None))
    np.testing.assert_array_equal(plain.weights, heads.weights)
    np.testing.assert_allclose(alone[3:-3], held_out[3:-3], atol=1e-9)


def test_where_all_are_copies_the_features_say_nothing() -> None:
    _, targets = problem((9, 1, 3, 2))
    _, held_out = fit_heads(np.full((9, 2, 3), 7.0), targets, copies=np.zeros(9, dtype=np.int64))
    assert np.isfinite(held_out).all()


def test_features_that_say_nothing_give_the_mean() -> None:
    _, targets = problem((9, 1, 3, 2))
    heads, held_out = fit_heads(np.full((9, 2, 3), 7.0), targets)
    np.testing.assert_allclose(heads.scores(np.ones((1, 2, 3))), targets.mean(0)[None])
    np.testing.assert_allclose(held_out, (targets.sum(0) - targets) / 8)


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(3, 12), width=st.integers(1, 15))
@settings(max_examples=25)
def test_the_order_of_rows_says_nothing(seed: int, rows: int, width: int) -> None:
    features, targets = problem((rows, 2, width, 3), seed)
    order = np.random.default_rng(seed).permutation(rows)
    heads, held_out = fit_heads(features, targets)
    again, of_others = fit_heads(features[order], targets[order])
    assert again.ridge == heads.ridge
    np.testing.assert_allclose(of_others, held_out[order], atol=1e-8)
    np.testing.assert_allclose(again.weights, heads.weights, atol=1e-8)


def test_logistic_regression_is_newtons() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((60, 3))
    y = (x[:, 0] - 0.5 * x[:, 1] + rng.standard_normal(60) > 0.3).astype(float)
    weights = rng.random(60)
    weights /= weights.sum()
    slopes, level = logistic(*(torch.from_numpy(each) for each in (x, y, weights)), 1e-2)
    wanted, intercept = slow.newton_logistic(x, y, weights, 1e-2)
    np.testing.assert_allclose(slopes.numpy(), wanted, atol=3e-4)
    assert float(level) == pytest.approx(intercept, abs=3e-4)


def test_a_log_linear_mixture_is_where_descent_ends() -> None:
    rng = np.random.default_rng(2)
    y = rng.integers(0, 3, 25)
    scores = rng.standard_normal((25, 3, 2))
    scores[np.arange(25), y, 0] += 1
    factors, biases = log_linear(torch.from_numpy(scores), torch.from_numpy(y), 1 / 25)
    wanted, offsets = slow.descended_log_linear(scores, y, 1 / 25)
    np.testing.assert_allclose(factors.numpy(), wanted, atol=3e-4)
    np.testing.assert_allclose(biases.numpy(), offsets, atol=3e-4)
    assert factors[0] > 0.3, "of the model that knows"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("turned", [False, True])
def test_a_weighted_mixture_is_where_descent_ends(seed: int, turned: bool) -> None:
    """Also where the first model is against the classes: of rows left out this is held to be nothing."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, 25)
    scores = rng.standard_normal((25, 3, 2))
    scores[np.arange(25), y] += [-1, 1] if turned else [1, -1]
    weights = rng.uniform(0.01, 1, 25)
    weights /= weights.sum()
    for left_out in (False, True):
        given_ = {"weights": torch.from_numpy(weights), "left_out": left_out}
        factors, biases = log_linear(torch.from_numpy(scores), torch.from_numpy(y), 1 / 25, **given_)
        wanted, offsets = slow.descended_log_linear(scores, y, 1 / 25, weights=weights, left_out=left_out)
        np.testing.assert_allclose(factors.numpy(), wanted, atol=3e-4)
        np.testing.assert_allclose(biases.numpy(), offsets, atol=3e-4)
        assert (factors[0] == 0) == (turned and left_out)
        assert (factors[1] > 0) == turned, "of a model that is not left out a factor may be below 0"


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(4, 20), times=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_a_row_of_weight_two_is_two_rows(seed: int, rows: int, times: int) -> None:
    rng = np.random.default_rng(seed)
    y, scores = rng.integers(0, 2, rows), rng.standard_normal((rows, 2, 1))
    counts = np.where(np.arange(rows) < rows // 2, times, 1)
    weights = torch.from_numpy(counts / counts.sum())
    weighted = log_linear(torch.from_numpy(scores), torch.from_numpy(y), 0.1, weights=weights)
    repeated = log_linear(*(torch.from_numpy(np.repeat(each, counts, axis=0)) for each in (scores, y)), 0.1)
    for one, other in zip(weighted, repeated, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-4)


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4), count=st.integers(2, 8), seed=st.integers(0, 99))
def test_folds_are_even_in_all_strata(sizes: list[int], count: int, seed: int) -> None:
    strata = np.repeat(np.arange(len(sizes)), sizes)
    folds = folds_of(strata, len(strata), count, seed=seed, purpose="query folds")
    assert set(folds.tolist()) <= set(range(count))
    for rows in [np.ones(len(strata), dtype=bool), *(strata == s for s in range(len(sizes)))]:
        held = np.bincount(folds[rows], minlength=count)
        assert held.max() - held.min() <= 1
    np.testing.assert_array_equal(folds, folds_of(strata, len(strata), count, seed=seed, purpose="query folds"))
