"""Models of answers against refits row by row, and on answers that their features say nothing of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import query as slow
from tsqlora_scale.quality.query import feature_heads
from tsqlora_scale.quality.query.answer_models import ClassModel, NumberModel, fit_answers, normal_density

RIDGES = (0.3, 3.0, 30.0)


def drawn(rows: int, classes: int | None, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (n, 1, 4), answers that they say something of, and weights."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, 1, 4))
    told = features[:, 0, 0] + 0.5 * rng.normal(size=rows)
    answers = told if classes is None else np.digitize(told, np.linspace(-0.7, 0.7, classes + 1)[1:-1])
    return features, answers, rng.uniform(0.05, 1.0, rows)


@pytest.mark.parametrize("classes", [2, 3, None])
@pytest.mark.parametrize("judged", [None, np.arange(20, 30)])
def test_a_model_is_that_of_refits(
    classes: int | None, judged: np.ndarray | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_heads, "RIDGES", RIDGES)
    features, answers, weights = drawn(30, classes)
    others, told, _ = drawn(7, classes, seed=1)
    model, left_out = fit_answers(features, answers, weights, judged=judged, classes=classes)
    wanted, of_others = slow.answers(
        features[:, 0], answers, weights, judged, (others[:, 0], told), classes=classes, strengths=RIDGES
    )
    np.testing.assert_allclose(left_out, wanted, atol=2e-3)
    np.testing.assert_allclose(model.log_likelihood(others, told), of_others, atol=2e-3)


@pytest.mark.parametrize("classes", [2, None])
def test_a_row_of_no_weight_is_a_row_not_seen(classes: int | None) -> None:
    """Left out of a fit in which it counts for next to nothing it is judged as by the fit that lacks it."""
    features, answers, weights = drawn(200, classes)
    fits = [
        fit_answers(features[:rows], answers[:rows], np.append(weights[:199], 1e-9)[:rows], classes=classes)
        for rows in (199, 200)
    ]
    unseen = fits[0][0].log_likelihood(features[199:], answers[199:])
    np.testing.assert_allclose(unseen, fits[1][1][199:], atol=1e-2)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(6, 40), classes=st.sampled_from([2, 4, None]))
def test_likelihoods_are_such_and_go_with_their_rows(seed: int, rows: int, classes: int | None) -> None:
    features, answers, weights = drawn(rows, classes, seed)
    model, left_out = fit_answers(features, answers, weights, classes=classes)
    order = np.random.default_rng(seed).permutation(rows)
    again, of_others = fit_answers(features[order], answers[order], weights[order], classes=classes)
    np.testing.assert_allclose(of_others, left_out[order], atol=1e-3)
    np.testing.assert_allclose(
        again.log_likelihood(features, answers), model.log_likelihood(features, answers), atol=1e-3
    )
    if classes is not None:
        every = [model.log_likelihood(features, np.full(rows, label)) for label in range(classes)]
        np.testing.assert_allclose(np.exp(every).sum(0), 1, atol=1e-9)
        assert left_out.max() <= 0


@pytest.mark.parametrize("rows", [30, 300])
def test_of_answers_of_chance_nothing_is_known(rows: int) -> None:
    """The mean of all other rows leans against a row's own class, and it must not be read off that."""
    known = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        features, answers = rng.normal(size=(rows, 1, 50)), rng.integers(0, 2, rows)
        _, left_out = ClassModel.fit(features, answers, np.ones(rows), judged=None, classes=2)
        known.append(left_out.mean())
    assert max(known) < np.log(0.5) + 0.05, known
    assert np.mean(known) < np.log(0.5) + 0.02, known


def test_a_number_is_as_likely_as_its_distance_says() -> None:
    """Up to the constant of a normal density."""
    errors = np.array([0.0, 1.0, -2.0])
    exact = [-0.5 * (error / 0.7) ** 2 - np.log(0.7 * np.sqrt(2 * np.pi)) for error in errors]
    np.testing.assert_allclose(normal_density(errors, 0.7) - 0.5 * np.log(2 * np.pi), exact)
    features, answers, weights = drawn(40, None)
    model, left_out = NumberModel.fit(features, answers, weights, judged=None)
    spread = (answers - model.heads.scores(features)[:, 0]).std()
    assert 0.8 * spread < model.deviation < 1.5 * spread
    assert np.isfinite(left_out).all()
