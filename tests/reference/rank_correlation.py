"""Spearman's correlation by its definition."""

from __future__ import annotations

import math
from collections.abc import Sequence


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's correlation of the ranks, a rank being the mean of the places that equal values could take."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(y < x for y in values) + (sum(y == x for y in values) + 1) / 2 for x in values]

    one, other = ranks(a), ranks(b)
    mean = (len(a) + 1) / 2
    product = math.fsum((x - mean) * (y - mean) for x, y in zip(one, other, strict=True))
    lengths = math.fsum((x - mean) ** 2 for x in one) * math.fsum((y - mean) ** 2 for y in other)
    return product / math.sqrt(lengths) if lengths > 0 else 0.0
