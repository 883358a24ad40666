"""Comparisons of score tables."""

from __future__ import annotations

import numpy as np

from tsqlora_scale.quality import ScoreTable


def assert_same_tables(one: ScoreTable, other: ScoreTable, atol: float = 1e-5) -> None:
    for name, column in one.state_dict().items():
        np.testing.assert_allclose(getattr(other, name), column.numpy(), rtol=1e-5, atol=atol, err_msg=name)


def assert_identical(one: ScoreTable, other: ScoreTable) -> None:
    for name, column in one.state_dict().items():
        np.testing.assert_array_equal(getattr(other, name), column.numpy(), err_msg=name)
