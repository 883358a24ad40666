"""The ratio, how far the query stands out, and the share that is as it is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import query as slow
from tsqlora_scale.quality.query.density_ratio import (
    EVIDENCE,
    RIDGE,
    DensityRatio,
    held_out_separation,
    separation,
    wanted_share,
)

numbers = st.lists(st.integers(-4, 4).map(float), min_size=2, max_size=30).map(np.array)


def test_the_ratio_is_a_balanced_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    pool, query = rng.normal(0, 1, (80, 2)), rng.normal((1.0, 0.5), 1, (15, 2))
    ratio = DensityRatio.fit(pool, query, rising=(True, True))
    both = np.concatenate([pool, query])
    x = (both - both.mean(0)) / both.std(0)
    weights = np.repeat([0.5 / 80, 0.5 / 15], [80, 15])
    slopes, level = slow.newton_logistic(x, np.repeat([0.0, 1.0], [80, 15]), weights, RIDGE)
    np.testing.assert_allclose(ratio.coefficients, slopes, atol=1e-5)
    np.testing.assert_allclose(ratio.log_ratio(both), x @ slopes + level, atol=1e-4)


def test_a_term_that_cannot_speak_against_a_row_does_not() -> None:
    rng = np.random.default_rng(0)
    pool, query = rng.normal(0, 1, (80, 3)), rng.normal((1.0, -2.0, -2.0), 1, (15, 3))
    ratio = DensityRatio.fit(pool, query, rising=(True, True, False))
    assert ratio.coefficients[0] > 0
    assert ratio.coefficients[1] == 0
    assert ratio.coefficients[2] < 0
    without = DensityRatio.fit(pool[:, [0, 2]], query[:, [0, 2]], rising=(True, False))
    np.testing.assert_allclose(ratio.coefficients[[0, 2]], without.coefficients, atol=1e-6)


def test_no_term_left_is_no_ratio() -> None:
    rng = np.random.default_rng(0)
    pool, query = rng.normal(0, 1, (80, 2)), rng.normal(-2.0, 1, (15, 2))
    ratio = DensityRatio.fit(pool, query, rising=(True, True))
    np.testing.assert_allclose(ratio.log_ratio(pool), 0, atol=1e-6)
    assert separation(ratio.log_ratio(pool), ratio.log_ratio(query)) == (0.5, 0.0)


@given(of_pool=numbers, of_query=numbers)
def test_separation_counts_pairs(of_pool: np.ndarray, of_query: np.ndarray) -> None:
    area, evidence = separation(of_pool, of_query)
    assert area == pytest.approx(slow.area(of_pool, of_query))
    assert np.sign(evidence) == np.sign(round(area - 0.5, 12))
    assert separation(of_query, of_pool)[0] == pytest.approx(1 - area)


@given(of_pool=numbers, of_query=numbers, seed=st.integers(0, 9))
def test_a_share_is_that_of_the_best_threshold(of_pool: np.ndarray, of_query: np.ndarray, seed: int) -> None:
    share, most = wanted_share(of_pool, of_query)
    assert (share, most) == pytest.approx(slow.wanted_share(of_pool, of_query))
    assert 0 <= share <= most <= 1
    rng = np.random.default_rng(seed)
    assert wanted_share(rng.permutation(of_pool), rng.permutation(of_query)) == (share, most)
    assert wanted_share(2 * of_pool + 1, 2 * of_query + 1) == (share, most), "by the order alone"


@pytest.mark.parametrize("share", [0.15, 0.4, 1.0])
def test_a_planted_share_is_found(share: float) -> None:
    """Of 2,000 rows, with 100 of the query, whose ratio is two deviations higher."""
    found = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        wanted = rng.random(2000) < share
        estimate, most = wanted_share(rng.normal(2.0 * wanted, 1), rng.normal(2, 1, 100))
        assert most >= share - 0.05
        found.append(estimate)
    assert abs(np.mean(found) - share) < 0.1, found


def test_evidence_has_the_size_that_it_says() -> None:
    """Of ratios that tell nothing three standard errors are rare, and most of pairs a deviation apart have them."""
    rng = np.random.default_rng(0)
    null = [separation(rng.normal(0, 1, 300), rng.normal(0, 1, 32))[1] for _ in range(300)]
    assert np.std(null) == pytest.approx(1, abs=0.15)
    assert np.mean(np.array(null) > EVIDENCE) < 0.01
    apart = [separation(rng.normal(0, 1, 300), rng.normal(1, 1, 32))[1] for _ in range(50)]
    assert np.mean(np.array(apart) > EVIDENCE) > 0.9


def test_terms_of_chance_are_no_evidence() -> None:
    """Six terms that say nothing of ten rows: fitted to these they do, and to others they do not."""
    rising = (True, True, False, False, False, False)
    fitted, held_out = [], []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        pool, query = rng.normal(0, 1, (200, 6)), rng.normal(0, 1, (10, 6))
        ratio = DensityRatio.fit(pool, query, rising=rising)
        fitted.append(separation(ratio.log_ratio(pool), ratio.log_ratio(query))[1])
        held_out.append(held_out_separation(pool, query, rising=rising, seed=seed)[1])
    assert np.mean(fitted) > 1.5
    assert abs(np.mean(held_out)) < 0.5
    assert sum(each > EVIDENCE for each in held_out) <= 1, held_out


def test_evidence_held_out_is_there_where_there_is_a_difference() -> None:
    rng = np.random.default_rng(0)
    pool, query = rng.normal(0, 1, (300, 2)), rng.normal((1.5, 0), 1, (20, 2))
    area, evidence = held_out_separation(pool, query, rising=(True, True), seed=0)
    assert 0.75 < area < 0.95
    assert evidence > EVIDENCE


def test_rows_and_their_copies_count_once() -> None:
    rng = np.random.default_rng(0)
    pool, query = rng.normal(0, 1, (50, 2)), rng.normal((1, 0), 1, (20, 2))
    pool, copies = np.repeat(pool, 4, axis=0), np.append(np.repeat(np.arange(50), 4), 50 + np.arange(20))
    area, evidence = held_out_separation(pool, query, rising=(True, True), copies=copies, seed=0)
    unaware = held_out_separation(pool, query, rising=(True, True), seed=0)
    assert area == unaware[0]
    assert evidence == pytest.approx((area - 0.5) * math.sqrt(12 * 50 * 20 / 71))
    assert unaware[1] == pytest.approx((area - 0.5) * math.sqrt(12 * 200 * 20 / 221))


def test_a_row_alone_is_no_evidence() -> None:
    assert held_out_separation(np.zeros((1, 2)), np.ones((12, 2)), rising=(True, True), seed=0) == (0.5, 0.0)
