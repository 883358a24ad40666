"""The ends of rankings, within labels."""

from __future__ import annotations

import numpy as np
import pytest

from tsqlora_scale.common import disk_arrays
from tsqlora_scale.report.rankings import lowest


@pytest.mark.parametrize("block", [2**20, 7])
@pytest.mark.parametrize("sign", [1, -1])
def test_every_class_has_its_share_of_the_lowest(block: int, sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three classes lies below all others as a whole; each has its errors at its own lower end."""
    monkeypatch.setattr(disk_arrays, "BLOCK", block)
    rng = np.random.default_rng(0)
    strata = rng.permutation(np.repeat([0, 1, 2], [501, 187, 512]))
    errors = rng.random(1200) < 0.05
    values = np.array([0.5, -3.0, 0.6])[strata] + 0.1 * rng.random(1200) - 0.5 * errors
    whole = np.argsort(values)[:60]
    assert set(strata[whole]) == {1}, "over the pool they are a class"
    found = lowest(sign * values, np.ones(1200, bool), strata, 60, sign=sign)
    assert len(set(found.tolist())) == 60
    np.testing.assert_allclose(np.bincount(strata[found]), 60 * np.bincount(strata) / 1200, atol=1)
    assert errors[found].mean() > 0.8
    for stratum in range(3):
        of_it = np.flatnonzero(strata == stratum)
        listed = found[strata[found] == stratum]
        assert listed.tolist() == of_it[np.argsort(values[of_it])][: len(listed)].tolist()


@pytest.mark.parametrize("block", [2**20, 3])
def test_without_classes_and_with_gaps(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_arrays, "BLOCK", block)
    values = np.array([3.0, np.nan, 1.0, 1.0, 5.0, 0.0, 2.0, 4.0])
    member = np.array([1, 1, 1, 1, 1, 0, 1, 1], dtype=bool)
    assert lowest(values, member, None, 3).tolist() == [2, 3, 6]
    assert lowest(values, member, None, 2, sign=-1).tolist() == [4, 7]
    assert lowest(values, member, None, 99).tolist() == [2, 3, 6, 0, 7, 4, 1], "what is not finite comes last"
    assert lowest(values, np.zeros(8, bool), None, 3).tolist() == []
    strata = np.array([0, 0, 0, 0, 5, 5, 5, 5], dtype=np.int32)
    assert lowest(values, member, strata, 4).tolist() == [2, 6, 3, 7]
