"""The rule of the choice, row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqlora_scale.quality.query.choice_rule import class_shares, kept_rows, wanted_probability
from tsqlora_scale.quality.query.density_ratio import EVIDENCE, Standing, surer_part

SHARES = st.floats(0.01, 1.0)


def standing(share: float, evidence: float = EVIDENCE + 1) -> Standing:
    return Standing(share, 1.0, 0.9, evidence)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=20), SHARES)
def test_a_row_is_wanted_by_its_ratio_times_the_share(ratios: list[float], share: float) -> None:
    """Of rows that are as the query is in ``share`` of the pool, ``q / p`` times it is the posterior, at most 1."""
    expected = [min(1.0, share * math.exp(ratio)) for ratio in ratios]
    np.testing.assert_allclose(wanted_probability(np.array(ratios), standing(share)), expected, rtol=1e-12)


@given(SHARES)
def test_the_surer_part(share: float) -> None:
    assert share / 2 < surer_part(share) <= share
    assert surer_part(1.0) == 1.0
    assert surer_part(0.5) == pytest.approx(0.5 * 1.25 / 2)
    assert kept_rows(standing(share), 1000, least=0) == round(1000 * share * (1 + share * share) / 2)
    assert kept_rows(standing(share), 1000, least=1000) == 1000


@given(SHARES, st.floats(-5, EVIDENCE))
def test_without_evidence_all_are_kept_and_alike(share: float, evidence: float) -> None:
    found = standing(share, evidence)
    assert kept_rows(found, 70, least=10) == 70
    np.testing.assert_array_equal(wanted_probability(np.array([-9.0, 0.0, 9.0]), found), 1.0)


def test_classes_that_the_query_lacks_keep_a_share() -> None:
    np.testing.assert_array_equal(class_shares(np.array([0, 0, 2]), 4), [4.0, 2.0, 3.0, 2.0])
