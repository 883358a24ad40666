"""Paired tests and halves, slow and obvious."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def sign_flip_p(differences: Sequence[float]) -> float:
    """The share of all assignments of signs whose mean is at least as far from 0 as the one that was seen."""
    seen = abs(sum(differences))
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(each >= seen - 1e-12 * (1 + seen) for each in sums) / len(sums)
