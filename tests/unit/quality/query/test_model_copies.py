"""Groups of rows that are one to a model, against the pairs of them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tsqlora_scale.quality.query.model_copies import ALIKE, are_alike, groups_to_a_model

#: Of four texts every way to write it: to the letter, and two that differ by case or spaces.
WRITTEN = ["a film", "a film ", "A  film"]


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12),
    tells=st.lists(st.booleans(), min_size=3, max_size=3),
    seed=st.integers(0, 100),
)
def test_groups_are_of_what_a_model_cannot_tell(rows: list[tuple[int, int]], tells: list[bool], seed: int) -> None:
    """``tells``: whether the model tells a way to write from the others."""
    features = normal((4, 3, 8), seed) + 3 * normal((4, 1, 8), seed + 1)
    for way in range(3):
        if not tells[way]:
            features[:, way] = features[:, 0 if not tells[0] else tells.index(False)]
    texts = [(f"{text} {WRITTEN[way]}",) for text, way in rows]
    noise = 1 + 1e-5 * normal((len(rows), 1), seed + 2)
    numbers = np.append(noise * np.array([features[row] for row in rows]), normal((len(rows), 1), seed + 3), axis=1)
    found = groups_to_a_model(texts, numbers)
    for i, (text, way) in enumerate(rows):
        for j, (other, its_way) in enumerate(rows):
            same = text == other and (way == its_way or are_alike(features[text, way], features[other, its_way]))
            assert (found[i] == found[j]) == same


def test_what_differs_by_more_than_rounding_is_not_alike() -> None:
    row = normal((30,), 0)
    assert are_alike(row, row * (1 + ALIKE / 3))
    assert not are_alike(row, row * (1 + 3 * ALIKE))
    assert not are_alike(row, -row)
