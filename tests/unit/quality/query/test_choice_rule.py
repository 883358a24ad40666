"""The rule of the choice, row by row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqlora_scale.quality.query.choice_rule import kept_rows, likely_rows, strata_of, strata_shares, surer_part
from tsqlora_scale.quality.query.density_ratio import EVIDENCE, Standing

SHARES = st.floats(0.01, 1.0)
#: Of rows: a class, and whether the pool expects it.
ROWS = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=40)


def standing(share: float, evidence: float = EVIDENCE + 1, *, by_mixture: bool = False) -> Standing:
    return Standing(share, 1.0, 0.9, evidence, by_mixture)


@given(SHARES)
def test_the_surer_part_of_a_first_look(share: float) -> None:
    assert share / 2 < surer_part(share) <= share
    assert surer_part(1.0) == 1.0
    assert surer_part(0.5) == pytest.approx(0.5 * 1.25 / 2)
    assert kept_rows(standing(share), 1000, least=0) == round(1000 * share * (1 + share * share) / 2)
    assert kept_rows(standing(share), 1000, least=1000) == 1000


@given(SHARES, st.integers(0, 1000))
def test_half_as_many_again_as_a_second_look_finds(share: float, least: int) -> None:
    kept = kept_rows(standing(share, by_mixture=True), 1000, least=least)
    assert kept == min(1000, max(round(1.5 * share * 1000), least))
    assert kept >= kept_rows(standing(share), 1000, least=least), "the rest is seldom drawn"


@given(SHARES, st.floats(-5, EVIDENCE), st.booleans())
def test_without_evidence_all_are_kept(share: float, evidence: float, by_mixture: bool) -> None:
    assert kept_rows(standing(share, evidence, by_mixture=by_mixture), 70, least=10) == 70


@given(ROWS)
def test_strata_are_pairs(rows: list[tuple[int, bool]]) -> None:
    """One number for each class and answer, whichever is known."""
    labels, agrees = (np.array(side) for side in zip(*rows, strict=True))
    for known, of_row in (
        ((labels, agrees), rows),
        ((labels, None), [label for label, _ in rows]),
        ((None, agrees), [agree for _, agree in rows]),
    ):
        strata = strata_of(*known)
        assert strata is not None and strata.dtype == np.int32 and strata.min() >= 0
        alike = strata[:, None] == strata[None]
        np.testing.assert_array_equal(alike, [[one == other for other in of_row] for one in of_row])
    assert strata_of(None, None) is None


@given(ROWS, st.integers(1, 4), st.integers(0, 100))
def test_strata_have_the_querys_shares(rows: list[tuple[int, bool]], more: int, seed: int) -> None:
    """And one row for every stratum of the query's, spread as the pool's wanted rows probably are."""
    labels, agrees = (np.array(side) for side in zip(*rows, strict=True))
    strata = strata_of(labels, agrees)
    assert strata is not None
    likely = np.random.default_rng(seed).random(int(strata.max()) + more)
    shares = strata_shares(strata, likely)
    seen = len(set(rows))
    assert len(shares) == len(likely)
    assert shares.sum() == pytest.approx(len(rows) + seen)
    for number, share in enumerate(shares.tolist()):
        own = sum(2 * label + agree == number for label, agree in rows)
        assert share == pytest.approx(own + seen * likely[number] / likely.sum())


def test_many_classes_do_not_swamp_a_query_of_few() -> None:
    wanted, likely = np.arange(10).repeat(6), np.full(100, 0.5)
    likely[:10] = 20.0
    shares = strata_shares(wanted, likely)
    assert shares[:10].sum() / shares.sum() > 0.95


def test_soft_draws_keep_a_margin_that_even_ones_do_not() -> None:
    found = standing(0.2, by_mixture=True)
    assert kept_rows(found, 1000, least=0) == 300
    assert kept_rows(found, 1000, least=0, soft=False) == 200


@given(ROWS, st.integers(0, 100))
def test_likely_rows_are_sums_by_stratum(rows: list[tuple[int, bool]], seed: int) -> None:
    labels, agrees = (np.array(side) for side in zip(*rows, strict=True))
    strata, wanted = strata_of(labels, agrees), np.random.default_rng(seed).random(len(rows))
    assert strata is not None
    for number, total in enumerate(likely_rows(strata, wanted).tolist()):
        assert total == pytest.approx(
            sum(w for s, w in zip(strata.tolist(), wanted.tolist(), strict=True) if s == number)
        )
