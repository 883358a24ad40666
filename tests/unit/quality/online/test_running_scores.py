"""Averages over visits, against every visit kept."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.online import averages
from tsqlora_scale.quality import ScoreTable
from tsqlora_scale.quality.online.running_scores import MEASURED, NEVER_FINITE, RunningScores

SIZE = 5
NUMBERS = st.one_of(st.floats(-1e3, 1e3), st.sampled_from([np.nan, np.inf]))
STEPS = st.lists(
    st.lists(st.tuples(st.integers(0, SIZE - 1), st.tuples(*[NUMBERS] * 4)), min_size=1, max_size=8),
    min_size=1,
    max_size=6,
)


def running() -> RunningScores:
    return RunningScores(ScoreTable.empty(SIZE), sketch_dim=16, memory=0.5)


@settings(deadline=None, max_examples=200)
@given(STEPS, st.integers(0, 6))
def test_they_are_the_means_of_all_finite_visits(steps: list, cut: int) -> None:
    """However often a step draws a sample, and through a checkpoint after any step."""
    arrays = [(np.array([row for row, _ in step]), np.array([value for _, value in step])) for step in steps]
    scores = running()
    for number, (rows, values) in enumerate(arrays):
        if number == cut:
            table, state = scores.table, scores.state_dict()
            scores = running()
            scores.table = ScoreTable.from_state_dict(table.state_dict())
            scores.load_state_dict(state)
        scores.visit(rows, values)
    means, visits = averages(SIZE, [(rows.tolist(), values) for rows, values in arrays])
    np.testing.assert_array_equal(np.maximum(scores.visits, 0), visits)
    seen = {row for rows, _ in arrays for row in rows.tolist()}
    for row in range(SIZE):
        assert (scores.visits[row] == NEVER_FINITE) == (row in seen and visits[row] == 0)
    for name, column in zip(MEASURED, means.T, strict=True):
        np.testing.assert_allclose(getattr(scores.table, name), column, rtol=1e-9, atol=1e-9)


def test_one_visit_is_the_number_itself() -> None:
    scores = running()
    scores.table.loss[:] = 7.0  # as a sample without a visit carries the mean of the others
    values = np.array([[0.1, 0.2, 0.3, 0.7]])
    scores.visit(np.array([3]), values)
    assert [getattr(scores.table, name)[3] for name in MEASURED] == values[0].tolist()
    assert scores.table.loss[2] == 7.0
    assert np.isnan(scores.table.quality).all(), "only averages are touched"


def test_the_direction_forgets() -> None:
    scores = running()
    scores.turn(torch.ones(16, dtype=torch.float64))
    scores.turn(2 * torch.ones(16, dtype=torch.float64))
    assert scores.direction.tolist() == [2.5] * 16
