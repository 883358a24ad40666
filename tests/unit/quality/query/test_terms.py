"""Terms of rows against loops, and what they make of pools whose truth is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import query as slow
from tests.unit.quality.query.planted import Made, zeros
from tsqlora_scale.quality.query.density_ratio import EVIDENCE, DensityRatio, held_out_separation, wanted_share
from tsqlora_scale.quality.query.terms import Likeness, fit_terms

KINDS = ["classes", "number", "text"]


@dataclass
class Judged:
    pool: np.ndarray
    query: np.ndarray
    coefficients: dict[str, float]
    evidence: float

    @property
    def kept(self) -> float:
        """Share of the pool that is trained on."""
        return wanted_share(self.pool, self.query)[0] if self.evidence > EVIDENCE else 1.0


def judged(made: Made, pool: np.ndarray, query: np.ndarray) -> Judged:
    terms, of_pool, of_query = fit_terms(made.shape, pool, query, seed=0)
    ratio = DensityRatio.fit(of_pool, of_query, rising=terms.rising)
    _, evidence = held_out_separation(of_pool, of_query, rising=terms.rising, seed=0)
    coefficients = dict(zip(terms.names, ratio.coefficients.tolist(), strict=True))
    return Judged(ratio.log_ratio(of_pool), ratio.log_ratio(of_query), coefficients, evidence)


@pytest.mark.parametrize("regions", [1, 2])
def test_likeness_is_a_mean_of_cosines(regions: int) -> None:
    rng = np.random.default_rng(0)
    pool, query = (rng.normal(1, 2, (n, 3, regions, 5)) for n in (9, 4))
    likeness, of_pool, of_query = Likeness.fit(pool, query)
    wanted, left_out = slow.likeness(pool, query)
    np.testing.assert_allclose(of_pool, wanted, atol=1e-9)
    np.testing.assert_allclose(of_query, left_out, atol=1e-9)
    np.testing.assert_allclose(likeness.cosines(pool[3:5]), wanted[3:5], atol=1e-9)


def test_copies_in_the_query_are_left_out_of_the_mean_together() -> None:
    rng = np.random.default_rng(0)
    pool, query = (rng.normal(1, 2, (n, 3, 1, 5)) for n in (9, 4))
    query, copies = query[[0, 1, 1, 2, 3, 1]], np.array([7, 2, 2, 9, 4, 2])
    _, of_pool, of_query = Likeness.fit(pool, query, copies=copies)
    both = np.concatenate([pool, query])
    unit = (both - both.mean(0)) / (both.std(0) + 1e-6)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    for row in range(6):
        others = unit[9:][copies != copies[row]]
        expected = np.mean([(unit[9 + row] * other).sum(-1).mean() for other in others])
        assert of_query[row, 0] == pytest.approx(expected, abs=1e-9)
    np.testing.assert_allclose(of_pool, slow.likeness(pool, query)[0], atol=1e-9)
    alike = Likeness.fit(pool, query[[1, 1, 1]], copies=np.zeros(3, dtype=np.int64))[2]
    assert np.isfinite(alike).all()


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(2, 12), wanted=st.integers(2, 6))
@settings(max_examples=25)
def test_likeness_is_bounded_and_goes_with_its_rows(seed: int, rows: int, wanted: int) -> None:
    rng = np.random.default_rng(seed)
    pool, query = rng.normal(0, 1, (rows, 2, 1, 4)), rng.normal(0, 1, (wanted, 2, 1, 4))
    order = rng.permutation(rows)
    _, of_pool, of_query = Likeness.fit(pool, query)
    assert np.abs(of_pool).max() <= 1 + 1e-9
    assert np.abs(of_query).max() <= 1 + 1e-9
    np.testing.assert_allclose(Likeness.fit(pool[order], query[::-1])[1], of_pool[order], atol=1e-9)
    np.testing.assert_allclose(Likeness.fit(pool[order], query[::-1])[2], of_query[::-1], atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_outside_are_rated_as_rows_inside_are(kind: str) -> None:
    """Large pools are fitted to a part: the rest must not be told apart by not having been there."""
    made = Made(kind, 0)
    pool, query = made.rows(np.arange(900) % 2, zeros(900)), made.rows(zeros(40), zeros(40))
    terms, inside, of_query = fit_terms(made.shape, pool[:600], query, seed=0)
    outside = terms.values(*made.shape.split(pool[600:]))
    assert inside.shape == (600, len(terms.names))
    assert of_query.shape == (40, len(terms.names))
    assert len(terms.rising) == len(terms.names)
    error = inside.std(0) * np.sqrt(1 / 300 + 1 / 600) + 1e-9
    assert (np.abs(outside.mean(0) - inside.mean(0)) < 4 * error).all()
    assert np.isfinite(outside).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_topic_is_found_in_a_mixed_pool(kind: str, seed: int) -> None:
    made = Made(kind, seed)
    topic = (np.arange(800) % 4 > 0).astype(np.int64)  # a quarter is on target
    pool, query = made.rows(topic, topic), made.rows(zeros(48), zeros(48))
    found = judged(made, pool, query)
    assert slow.area(found.pool[topic == 1], found.pool[topic == 0]) > 0.9
    assert 0.1 < found.kept < 0.45
    assert wanted_share(found.pool, found.query)[1] >= 0.25


@pytest.mark.parametrize("kind", ["classes", "number"])
@pytest.mark.parametrize("seed", range(3))
def test_another_labelling_is_found_where_texts_are_alike(kind: str, seed: int) -> None:
    made = Made(kind, seed)
    rule = (np.arange(1000) % 10 >= 3).astype(np.int64)
    pool, query = made.rows(zeros(1000), rule), made.rows(zeros(100), zeros(100))
    found = judged(made, pool, query)
    assert slow.area(found.pool[rule == 1], found.pool[rule == 0]) > 0.65
    assert found.coefficients["log_q"] > found.coefficients["text_term"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [10, 64])
def test_a_pool_that_is_all_on_target_is_kept(kind: str, wanted: int) -> None:
    """Whole, for there is no evidence against any of it, and by what stands out all the same not far from it."""
    kept = []
    for seed in range(10):
        made = Made(kind, seed)
        found = judged(made, made.rows(zeros(200), zeros(200)), made.rows(zeros(wanted), zeros(wanted)))
        kept.append(found.kept)
    assert kept.count(1.0) >= 9, kept
    assert min(kept) > 0.4


def test_a_query_of_one_class_and_a_class_that_only_the_query_has() -> None:
    made = Made("classes", 0)
    pool, query = made.rows(zeros(60), zeros(60)), made.rows(zeros(12), zeros(12))
    for answer in (0.0, 2.0):
        query[:, -1] = answer
        found = judged(made, pool, query)
        assert np.isfinite(found.pool).all()
        assert np.isfinite(found.query).all()


def test_a_class_that_the_fitted_rows_lack_is_rated() -> None:
    made = Made("classes", 0)
    pool, query = made.rows(zeros(60), zeros(60)), made.rows(zeros(12), zeros(12))
    rare = pool[:5].copy()
    rare[:, -1] = 4
    terms, _, _ = fit_terms(made.shape, pool, query, seed=0, classes=5)
    found = terms.values(*made.shape.split(rare))
    assert np.isfinite(found).all()
    assert (found[:, 1] < terms.values(*made.shape.split(pool[:5]))[:, 1]).all(), "nothing of the kind is wanted"
