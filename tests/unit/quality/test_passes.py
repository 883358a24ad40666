"""The numbers of one pass among those of earlier ones."""

from __future__ import annotations

import numpy as np
import pytest

from tsqlora_scale.common import disk_arrays
from tsqlora_scale.quality.scores.equations import Standardisation
from tsqlora_scale.quality.scores.pass_scores import PassScores
from tsqlora_scale.quality.scores.score_table import NEVER, ScoreTable


@pytest.fixture(params=[3, 1000])
def scores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[ScoreTable, PassScores]:
    """Ten samples of which the first pass has seen six, and a second pass over four of the ten, in two parts."""
    monkeypatch.setattr(disk_arrays, "BLOCK", request.param)
    before = ScoreTable.empty(10)
    before.scoring_pass[:6] = 0
    before.loss[:] = np.arange(10) + 1.0
    before.quality[:] = [0.0, 0.1, -2.0, 0.3, 0.4, 0.5, 0.2, 0.2, 0.2, 0.2]
    made = PassScores(before.copy(), 1)
    made.enter(np.array([8, 1]), np.array([[0.5, 1.0, 0.1, 0.3], [1.5, 2.0, 0.2, -0.4]]))
    made.enter(np.array([4, 5]), np.array([[2.5, np.inf, 0.3, 0.5], [4.5, 4.0, 0.6, 0.6]]))
    return before, made


def test_the_pass_is_what_was_entered(scores):
    before, made = scores
    assert len(made) == 4
    assert made.table.scoring_pass.tolist() == [0, 1, 0, 0, 1, 1, NEVER, NEVER, 1, NEVER]
    assert made.table.grad_norm[[1, 4, 5, 8]].tolist() == [2.0, np.inf, 4.0, 1.0]
    others = [0, 2, 3, 6, 7, 9]
    assert (made.table.loss[others] == before.loss[others]).all()
    assert np.flatnonzero(made.finite()).tolist() == [1, 5, 8]
    assert made.not_finite(made.finite(), 5) == (1, [4])
    assert made.not_finite(np.zeros(10, bool), 3) == (4, [1, 4, 5])


def test_a_sample_that_no_pass_has_seen_has_no_trend(scores):
    before, made = scores
    made.take_loss_trend(before)
    assert made.table.convergence[[1, 4, 5, 8]].tolist() == [0.5, 2.5, 1.5, 0.0]


def test_what_is_not_finite_is_the_worst_of_all_passes(scores):
    before, made = scores
    standardisation, finite = Standardisation(), made.finite()
    made.fit(standardisation, finite)
    terms = np.array([[2.0, 0.2, -0.4], [4.0, 0.6, 0.6], [1.0, 0.1, 0.3]])
    np.testing.assert_allclose(standardisation.mean, terms.mean(axis=0))
    weights = np.array([0.2, 0.3, 0.5])
    made.rate(standardisation, weights, finite, before=before)
    z = (terms - terms.mean(axis=0)) / terms.std(axis=0)
    np.testing.assert_allclose(made.table.quality[[1, 5, 8]], z @ weights)
    assert made.table.quality[4] == -2.0
    made.rate(standardisation, weights, finite, before=None)
    assert made.table.quality[4] == made.table.quality[[1, 5, 8]].min()
    made.give_rest_the_mean(finite)
    np.testing.assert_allclose(made.table.grad_norm[[6, 7, 9]], terms[:, 0].mean())
    np.testing.assert_allclose(made.table.loss[[6, 7, 9]], np.mean([1.5, 4.5, 0.5]))
    np.testing.assert_allclose(made.table.quality[[6, 7, 9]], made.table.quality[[1, 5, 8]].mean())
    assert (made.table.loss[:4] == [1.0, 1.5, 3.0, 4.0]).all()
