"""Which rows are one to a model: whoever has seen the one has seen the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from tsqlora_scale.common.copies import copy_groups, text_groups

#: Distance of two rows' features, as a share of their length, up to which they are the same but for rounding. No more:
#: closed forms that leave groups out take their rows for equal (:func:`.fit_heads`).
ALIKE = 1e-3


def are_alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether a model makes the same of two rows, by their features (d,)."""
    one, other = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    return bool(np.linalg.norm(one - other) <= ALIKE * min(np.linalg.norm(one), np.linalg.norm(other)))


def groups_to_a_model(texts: Sequence[Sequence[str]], numbers: np.ndarray) -> np.ndarray:
    """The number of every row's group of copies, (n,) int64: texts that are the same to the letter, or but for case
    and spaces where the model makes the same of them.

    Args:
        texts: one or more of every row.
        numbers: of the rows, (n, d + 1): features, and then an answer, which does not count.
    """
    exact, loose = text_groups(texts, exact=True), text_groups(texts)
    first = np.unique(exact, return_index=True)[1]  # a row of each, in the order of their numbers
    order = np.argsort(loose[first], kind="stable")
    bounds = np.flatnonzero(np.diff(loose[first][order])) + 1
    pairs = [
        pair
        for group in np.split(order, bounds)
        for pair in combinations(group.tolist(), 2)
        if are_alike(numbers[first[pair[0]], :-1], numbers[first[pair[1]], :-1])
    ]
    united = copy_groups(np.array(pairs, dtype=np.int64).reshape(-1, 2), len(first))
    groups: np.ndarray = np.unique(united[exact], return_inverse=True)[1]
    return groups
