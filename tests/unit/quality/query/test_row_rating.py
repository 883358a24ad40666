"""Both looks: what rows come to by each, and what the second adds where most of a pool follows another rule."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.quality.query.planted import Made, zeros
from tsqlora_scale.advice.query_choice import PoolRatio, chosen_weights
from tsqlora_scale.config.quality_sections import SamplingConfig
from tsqlora_scale.quality.draws.key_order import largest
from tsqlora_scale.quality.query.choice_rule import likely_rows, strata_of, strata_shares
from tsqlora_scale.quality.query.density_ratio import EVIDENCE, DensityRatio, Standing, separation, stand
from tsqlora_scale.quality.query.mixture import Mixture
from tsqlora_scale.quality.query.row_rating import RowRating
from tsqlora_scale.quality.selectors.ranked import quota_of

SHARE = 0.3


def known_by_text(share: float, evidence: float = EVIDENCE + 1) -> RowRating:
    """By a first look alone, of one term that is the log ratio."""
    terms: Any = type("Terms", (), {"names": ("text_term",)})()
    ratio = DensityRatio(np.ones(1), 0.0, np.zeros(1), np.ones(1))
    shape: Any = None
    return RowRating(shape, terms, ratio, None, Standing(share, 1.0, 0.9, evidence), np.zeros((0, 1)), np.zeros((0, 1)))


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20), st.floats(0.01, 1.0))
def test_a_row_is_wanted_by_its_ratio_times_the_share(ratios: list[float], share: float) -> None:
    """Of rows that are as the query is in ``share`` of the pool, ``q / p`` times it is the posterior, at most 1."""
    values = np.array(ratios)[:, None]
    expected = [min(1.0, share * math.exp(ratio)) for ratio in ratios]
    np.testing.assert_allclose(known_by_text(share).wanted(values), expected, rtol=1e-12)
    assert known_by_text(share).agrees(values) is None


@given(st.floats(0.01, 1.0), st.floats(-5, EVIDENCE))
def test_without_evidence_all_are_alike(share: float, evidence: float) -> None:
    found = known_by_text(share, evidence).wanted(np.array([[-9.0], [0.0], [9.0]]))
    np.testing.assert_array_equal(found, 1.0)


def area(low: np.ndarray, high: np.ndarray) -> float:
    return separation(low, high)[0]


@dataclass
class Looked:
    """A pool of which a part follows the query's rule, by both looks."""

    made: Made
    pool: np.ndarray
    query: np.ndarray
    is_wanted: np.ndarray
    rating: RowRating
    wanted_agreement: float

    @classmethod
    def of(cls, kind: str, seed: int, rows: int = 1000, queried: int = 100) -> Looked:
        made = Made(kind, seed)
        rule = (np.arange(rows) % 10 >= 10 * SHARE).astype(np.int64)
        pool, query = made.rows(zeros(rows), rule), made.rows(zeros(queried), zeros(queried))
        rating = RowRating.fit(made.shape, pool, query, seed=0, classes=2 if kind == "classes" else 0)
        assert rating.mixture is not None
        more = made.rows(zeros(4000), zeros(4000))
        return cls(made, pool, query, rule == 0, rating, float(made.agreement(more, 1).mean()))

    @property
    def labels(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Class ids of pool and query."""
        if self.made.kind != "classes":
            return None, None
        return self.pool[:, -1].astype(np.int64), self.query[:, -1].astype(np.int64)

    def drawn_agreement(self, weights: np.ndarray) -> float:
        """How often the rule of most of the pool predicts a drawn row's answer."""
        return float(np.average(self.made.agreement(self.pool, 1), weights=weights))

    def surest(self, count: int, *, halved: bool) -> np.ndarray:
        """The ``count`` surest rows with the query's shares of classes, and ``halved`` of what the pool expects."""
        score = self.rating.log_ratio(self.rating.of_pool)
        sides = zip(self.labels, (self.rating.of_pool, self.rating.of_query), strict=True)
        strata, wanted = (strata_of(labels, self.rating.agrees(values) if halved else None) for labels, values in sides)
        if strata is None or wanted is None:
            return largest(score, np.array([count]), None)
        shares = strata_shares(wanted, likely_rows(strata, self.rating.wanted(self.rating.of_pool)))
        return largest(score, quota_of(np.bincount(strata), count, shares), strata)


def drawn_by(looked: Looked, rating: RowRating) -> np.ndarray:
    """How often the pool's rows are drawn, by the rule of ``sampling.selector: query``."""
    (labels, wanted), sides = looked.labels, (rating.of_pool, rating.of_query)
    agrees = [rating.agrees(values) for values in sides]
    ratio = PoolRatio(
        of_pool=rating.log_ratio(sides[0]),
        of_query=rating.log_ratio(sides[1]),
        standing=rating.standing,
        wanted=rating.wanted(sides[0]),
        agrees=None if agrees[0] is None or agrees[1] is None else (agrees[0], agrees[1]),
    )
    return chosen_weights(ratio, SamplingConfig(), size=len(sides[0]), labels=labels, wanted=wanted)


def by_first_look(rating: RowRating) -> RowRating:
    """What is known were there no second."""
    of_pool, of_query = (values[:, : len(rating.terms.names)] for values in (rating.of_pool, rating.of_query))
    _, standing = stand(of_pool, of_query, rising=rating.terms.rising, seed=0)
    return replace(rating, mixture=None, standing=standing, of_pool=of_pool, of_query=of_query)


@pytest.fixture(scope="module", params=["classes", "number"])
def looked(request: pytest.FixtureRequest) -> list[Looked]:
    """Pools of 1,000 rows, 300 of them labelled as the query's 100 are, the rest by another rule of the same texts."""
    return [Looked.of(request.param, seed) for seed in range(8)]


def test_a_second_look_tells_more(looked: list[Looked]) -> None:
    """The wanted rows stand out further, and their share is nearer to what it is."""
    gains, errors = [], []
    for each in looked:
        first, rating, is_wanted = by_first_look(each.rating), each.rating, each.is_wanted
        areas = [
            area(found.log_ratio(found.of_pool)[~is_wanted], found.log_ratio(found.of_pool)[is_wanted])
            for found in (first, rating)
        ]
        gains.append(areas[1] - areas[0])
        errors.append([abs(found.standing.share - SHARE) for found in (first, rating)])
        wanted = rating.wanted(rating.of_pool)
        assert wanted.min() >= 0 and wanted.max() <= 1
        assert wanted.mean() == pytest.approx(rating.standing.share, abs=0.05)
        assert rating.standing.share <= rating.standing.most
        assert rating.standing.by_mixture and not first.standing.by_mixture
    assert min(gains) > -0.02 and np.mean(gains) > 0.015, gains
    before, after = np.mean(errors, axis=0)
    assert after < 0.7 * before, errors
    assert after < 0.1, errors


def test_draws_are_no_lesson_in_the_pools_rule_or_against_it(looked: list[Looked]) -> None:
    """The rule of most rows predicts a drawn row's answer as often as a wanted row's; the surer part of a first look
    is made of rows that go against it. (This is so without the strata: of draws by probability from half as many again
    as are wanted. See the next test.)"""
    off = []
    for each in looked:
        drawn = [each.drawn_agreement(drawn_by(each, found)) for found in (by_first_look(each.rating), each.rating)]
        off.append([agreement - each.wanted_agreement for agreement in drawn])
    first, second = np.mean(off, axis=0)
    assert first < -0.12, off
    assert abs(second) < 0.05, off
    assert np.abs(off).mean(0)[1] < 0.5 * np.abs(off).mean(0)[0], off


def test_strata_keep_a_small_choice_in_balance(looked: list[Looked]) -> None:
    """Of the 100 surest rows (``sampling.keep_fraction``) fewer go with the pool's rule than of the wanted; with strata
    by what the pool expects, more than without. Without the strata this fails."""
    plain, halved = (
        np.array([each.drawn_agreement(each.surest(100, halved=by)) - each.wanted_agreement for each in looked])
        for by in (False, True)
    )
    assert plain.mean() < -0.2, plain
    assert halved.mean() > plain.mean() + 0.05, (plain, halved)
    assert np.abs(halved).mean() < 0.8 * np.abs(plain).mean(), (plain, halved)
    for each in looked:
        chosen, rating = each.surest(100, halved=True), each.rating
        pool, query = rating.agrees(rating.of_pool), rating.agrees(rating.of_query)
        assert pool is not None and query is not None
        assert pool[chosen].mean() == pytest.approx(query.mean(), abs=0.03), "as the model of the pool has it"


@pytest.mark.parametrize("kind", ["classes", "number"])
def test_rows_that_no_look_has_seen_are_rated_as_others_are(kind: str) -> None:
    """Large pools are fitted to a part: the rest must not be told apart by not having been there."""
    made = Made(kind, 0)
    rule = (np.arange(1600) % 10 >= 3).astype(np.int64)
    pool, query = made.rows(zeros(1600), rule), made.rows(zeros(100), zeros(100))
    rating = RowRating.fit(made.shape, pool[:1000], query, seed=0, classes=2 if kind == "classes" else 0)
    assert rating.mixture is not None
    outside = rating.values(pool[1000:].astype(np.float64))
    error = rating.of_pool.std(0) * np.sqrt(1 / 600 + 1 / 1000) + 1e-9
    assert (np.abs(outside.mean(0) - rating.of_pool.mean(0)) < 4 * error).all()
    probability = rating.wanted(outside)
    assert probability.mean() == pytest.approx(rating.wanted(rating.of_pool).mean(), abs=0.06)
    assert area(probability[rule[1000:] == 1], probability[rule[1000:] == 0]) > 0.75


def test_a_text_is_looked_at_once_and_so_is_a_query_that_does_not_stand_out() -> None:
    made = Made("text", 0)
    topic = (np.arange(300) % 4 > 0).astype(np.int64)
    texts = RowRating.fit(made.shape, made.rows(topic, topic), made.rows(zeros(40), zeros(40)), seed=0)
    assert texts.standing.is_evident and texts.mixture is None
    made = Made("classes", 0)
    alike = RowRating.fit(made.shape, made.rows(zeros(200), zeros(200)), made.rows(zeros(30), zeros(30)), seed=0)
    assert not alike.standing.is_evident and alike.mixture is None
    for rating in (texts, alike):
        assert rating.names == rating.terms.names
        assert rating.agrees(rating.of_pool) is None
        assert not rating.standing.by_mixture


def test_a_share_is_not_above_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is that of a first look, which a second may go beyond."""
    made = Made("number", 0)
    rule = (np.arange(300) % 10 >= 3).astype(np.int64)
    pool, query, fit = made.rows(zeros(300), rule), made.rows(zeros(60), zeros(60)), Mixture.fit

    def surer(*arguments: Any, **options: Any) -> Any:
        mixture, *values = fit(*arguments, **options)
        return replace(mixture, share=0.999), *values

    monkeypatch.setattr(Mixture, "fit", surer)
    standing = RowRating.fit(made.shape, pool, query, seed=0).standing
    assert standing.share == standing.most == 0.999


@pytest.mark.parametrize(("kind", "least"), [("classes", 0.14), ("number", 0.16)])
def test_a_share_does_not_shrink_where_both_parts_follow_one_rule(kind: str, least: float) -> None:
    """Of two topics with one rule a quarter is wanted; without its handicap the smaller part's share would be lower."""
    shares = []
    for seed in range(3):
        made = Made(kind, seed)
        topic = (np.arange(1000) < 250).astype(np.int64)
        pool, query = made.rows(topic, zeros(1000)), made.rows(zeros(64) + 1, zeros(64))
        rating = RowRating.fit(made.shape, pool, query, seed=0, classes=2 if kind == "classes" else 0)
        assert rating.mixture is not None
        shares.append(rating.standing.share)
    assert min(shares) > least


def test_copies_do_not_make_a_pool_another() -> None:
    """Of a pool that is as the query is, half of it five times: what has seen a copy expects its answer."""
    evident = {"told": 0, "not told": 0}
    for seed in range(6):
        made = Made("classes", seed)
        pool, query = made.rows(zeros(100), zeros(100)), made.rows(zeros(64), zeros(64))
        numbers = np.concatenate([np.arange(100), *[np.arange(50)] * 4, 100 + np.arange(64)])
        for name, copies in (("told", numbers), ("not told", None)):
            rating = RowRating.fit(made.shape, pool[numbers[:-64]], query, copies=copies, seed=0, classes=2)
            evident[name] += rating.standing.is_evident
    assert evident["told"] == 0
    assert evident["not told"] >= 3


@pytest.mark.parametrize("kind", ["classes", "number"])
def test_a_copied_row_is_rated_as_if_it_were_alone(kind: str) -> None:
    """By the mixture, too: the pool's rule is the other one, and copies of wanted rows are found as before."""
    looked = Looked.of(kind, 0)
    numbers = np.concatenate([np.arange(1000), *[np.arange(0, 1000, 5)] * 3, 2000 + np.arange(100)])
    places, classes = numbers[:-100], 2 if kind == "classes" else 0
    rating = RowRating.fit(
        looked.made.shape, looked.pool[places], looked.query, copies=numbers, seed=0, classes=classes
    )
    sure, wanted, copied = (
        rating.wanted(rating.of_pool),
        looked.is_wanted[places],
        np.isin(places, np.arange(0, 1000, 5)),
    )
    alone = looked.rating.wanted(looked.rating.of_pool)
    for part in (copied, ~copied):
        before = alone[places[part]]
        found = [area(values[~wanted[part]], values[wanted[part]]) for values in (sure[part], before)]
        assert found[0] > found[1] - 0.03
    groups = [sure[places == place] for place in range(0, 1000, 5)]
    assert max(float(np.ptp(group)) for group in groups) < 1e-9, "copies with one answer are rated alike"


@pytest.mark.parametrize("kind", ["classes", "number", "text"])
def test_rows_of_the_query_in_the_pool_are_no_part_of_the_fit(kind: str) -> None:
    made = Made(kind, 1)
    topic = (np.arange(300) % 4 > 0).astype(np.int64)
    pool, query = made.rows(topic, topic), made.rows(zeros(40), zeros(40))
    classes = 2 if kind == "classes" else 0
    alone = RowRating.fit(made.shape, pool, query, seed=0, classes=classes)
    more = np.concatenate([pool[:100], query[:10], pool[100:]])
    copies = np.concatenate([np.arange(100), 300 + np.arange(10), np.arange(100, 300), 300 + np.arange(40)])
    found = RowRating.fit(made.shape, more, query, copies=copies, seed=0, classes=classes)
    is_own = np.arange(310) // 10 == 10
    np.testing.assert_array_equal(found.of_pool[~is_own], alone.of_pool)
    np.testing.assert_array_equal(found.of_query, alone.of_query)
    np.testing.assert_array_equal(found.of_pool[is_own], alone.values(query[:10].astype(np.float64)))
    likely = found.wanted(found.of_pool)[is_own]
    assert found.standing.share == pytest.approx((300 * alone.standing.share + likely.sum()) / 310, abs=2e-3)
    assert likely.mean() > 0.6
    whole = RowRating.fit(made.shape, query, query, copies=np.tile(np.arange(40), 2), seed=0, classes=classes)
    assert np.isfinite(whole.log_ratio(whole.of_pool)).all() and not whole.standing.is_evident
