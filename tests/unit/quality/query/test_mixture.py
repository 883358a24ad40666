"""The second look against plain rounds of refits, and what must hold of it whatever the pool."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import query as slow
from tsqlora_scale.quality.query import feature_heads, mixture
from tsqlora_scale.quality.query.mixture import Mixture, leading, prior_odds
from tsqlora_scale.quality.query.terms import Likeness

RIDGES = (1.0, 10.0, 100.0)
DIRECTIONS = 6  # of two layers of five features each
#: Features, answers, and the first look's terms.
Side = tuple[np.ndarray, np.ndarray, np.ndarray]


def drawn(rng: np.random.Generator, rules: np.ndarray, wanted: np.ndarray, classes: int | None) -> Side:
    """Rows of which those that are ``wanted`` follow another rule, in texts that lie a little apart."""
    features = rng.normal(size=(len(wanted), 2, 1, rules.shape[1])) + 0.5 * wanted[:, None, None, None]
    answers = (features[:, 0, 0] * rules[wanted]).sum(1) + 0.3 * rng.normal(size=len(wanted))
    if classes is not None:
        answers = np.digitize(answers, np.linspace(-1, 1, classes + 1)[1:-1])
    return features, answers, np.column_stack([features[:, 0, 0].mean(1), -rng.random((len(wanted), 2))])


def sides(seed: int, classes: int | None, pool: int = 40, query: int = 14, *, alike: bool = False) -> list[Side]:
    """Of a pool, of a query, and of rows that no model has seen; all follow one rule if ``alike``."""
    rng = np.random.default_rng(seed)
    rules = 1.5 * rng.normal(size=(2, 5))
    if alike:
        rules[1] = rules[0]
    wanted = [np.arange(pool) % 3 == 0, np.ones(query), np.arange(6) % 2]
    return [drawn(rng, rules, each.astype(np.int64), classes) for each in wanted]


def fitted(pool: Side, query: Side, wanted: np.ndarray, classes: int | None) -> tuple[Mixture, np.ndarray, np.ndarray]:
    (x, y, terms), (z, asked, of_query) = pool, query
    likeness = Likeness.fit(x, z)[0]
    return Mixture.fit(likeness, (x, z), (y, asked), (terms, of_query), wanted, classes=classes)


@pytest.mark.parametrize("classes", [2, 3, None])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_mixture_is_made_of_refits(
    classes: int | None, rounds: int, alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_heads, "RIDGES", RIDGES)
    monkeypatch.setattr(mixture, "DIRECTIONS", DIRECTIONS)
    monkeypatch.setattr(mixture, "ROUNDS", rounds)
    pool, query, unseen = sides(0, classes, alike=alike)
    # of few rows that are probably wanted the query's alone teach, and the rest's model is the better one
    wanted = np.random.default_rng(1).random(len(pool[0])) * (0.05 if alike else 1.0)
    expected = slow.mixture(
        (pool, query, unseen), wanted, classes=classes, directions=DIRECTIONS, rounds=rounds, strengths=RIDGES
    )
    found, of_pool, of_query = fitted(pool, query, wanted, classes)
    assert found.share == pytest.approx(expected.share, abs=2e-3)
    assert found.handicap == pytest.approx(expected.handicap, abs=1e-2)
    if alike:
        assert found.handicap > 0.02
    np.testing.assert_allclose(of_pool, expected.pool, atol=1e-2)
    np.testing.assert_allclose(of_query, expected.query, atol=1e-2)
    np.testing.assert_allclose(found.log_odds(pool[2][:, 0], of_pool), expected.odds, atol=2e-2)
    values = found.values(unseen[0], unseen[1], unseen[2][:, 2])
    np.testing.assert_allclose(values, expected.unseen, atol=1e-2)
    np.testing.assert_allclose(found.log_odds(unseen[2][:, 0], values), expected.unseen_odds, atol=2e-2)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), classes=st.sampled_from([2, 3, None]), rows=st.integers(12, 40))
def test_the_order_of_rows_says_nothing(seed: int, classes: int | None, rows: int) -> None:
    pool, query, unseen = sides(seed, classes, pool=rows)
    rng = np.random.default_rng(seed)
    wanted, orders = rng.random(rows), [rng.permutation(len(side[0])) for side in (pool, query)]
    found, of_pool, of_query = fitted(pool, query, wanted, classes)
    turned: list[Side] = [
        (x[order], y[order], terms[order]) for (x, y, terms), order in zip((pool, query), orders, strict=True)
    ]
    again, pool_again, query_again = fitted(turned[0], turned[1], wanted[orders[0]], classes)
    assert 0 < found.share < 1
    assert again.share == pytest.approx(found.share, abs=1e-3)
    np.testing.assert_allclose(pool_again, of_pool[orders[0]], atol=1e-2)
    np.testing.assert_allclose(query_again, of_query[orders[1]], atol=1e-2)
    values = found.values(unseen[0], unseen[1], unseen[2][:, 2])
    np.testing.assert_allclose(found.values(unseen[0][:2], unseen[1][:2], unseen[2][:2, 2]), values[:2], atol=1e-9)
    assert np.isfinite(values).all()


@given(ratios=st.lists(st.floats(-30, 30), min_size=1, max_size=20), share=st.floats(1e-3, 0.999), more=st.floats(0, 5))
def test_prior_odds_are_those_of_the_share_times_the_ratio(ratios: list[float], share: float, more: float) -> None:
    odds = prior_odds(np.array(ratios), share)
    np.testing.assert_allclose(odds, [slow.prior_odds(ratio, share) for ratio in ratios], atol=1e-9)
    likely = 1 / (1 + np.exp(-odds))
    assert likely.min() >= 1e-3 - 1e-12
    assert likely.max() <= 0.98 + 1e-12
    assert (prior_odds(np.array(ratios) + more, share) >= odds - 1e-9).all()


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(9, 20), layers=st.integers(1, 3), count=st.integers(1, 30))
@settings(max_examples=25)
def test_directions_are_those_of_the_largest_singular_values(seed: int, rows: int, layers: int, count: int) -> None:
    width = 7
    parts = [np.random.default_rng([seed, part]).normal(size=(rows, layers, width)) for part in range(2)]
    found = leading(parts, count)
    kept = min(max(count // layers, 1), width)
    assert found.shape == (layers, width, kept)
    for layer in range(layers):
        np.testing.assert_allclose(found[layer].T @ found[layer], np.eye(kept), atol=1e-9)
        both = np.concatenate([part[:, layer] for part in parts])
        explained = np.square(both @ found[layer]).sum()
        assert explained == pytest.approx(np.square(both @ slow.leading(both, kept)).sum(), rel=1e-6)


def test_an_answer_is_expected_that_the_text_makes_likelier() -> None:
    """The third value: ``log p(y|x) - log p(y)``, whatever the models of the parts are."""
    pool, query, unseen = sides(3, 3)
    found, of_pool, of_query = fitted(pool, query, np.full(40, 0.3), 3)
    for (_, answers, terms), values in (
        (pool, of_pool),
        (query, of_query),
        (unseen, found.values(unseen[0], unseen[1], unseen[2][:, 2])),
    ):
        usual = [math.log((int((pool[1] == answer).sum()) + 1) / (len(pool[1]) + 3)) for answer in answers]
        np.testing.assert_allclose(values[:, 2], terms[:, 2] - usual, atol=1e-12)


def test_a_class_that_only_unseen_rows_have_is_rated() -> None:
    pool, query, unseen = sides(4, 3)
    found, _, _ = fitted(pool, query, np.full(40, 0.3), 5)
    values = found.values(unseen[0], np.full(6, 4), unseen[2][:, 2])
    assert np.isfinite(found.log_odds(unseen[2][:, 0], values)).all()
    assert (values[:, 0] < found.values(unseen[0], unseen[1], unseen[2][:, 2])[:, 0]).all(), "nothing like it is wanted"
