"""Shares of a mixture's sets, slow and obviously correct: one row at a time."""

from __future__ import annotations

from collections.abc import Sequence


def shares(sizes: Sequence[int], weights: Sequence[float] | None, temperature: float | None) -> list[float]:
    """Of the draws, of every set."""
    parts = [size ** (1 / (temperature or 1.0)) for size in sizes] if weights is None else list(weights)
    return [part / sum(parts) for part in parts]


def probabilities(
    sets: Sequence[int], rows: Sequence[float], wanted: Sequence[float], query: int | None = None
) -> list[float]:
    """Of every row to be drawn: its set is drawn by the wanted shares, and then a row of it by the rows' weights.

    Args:
        sets: of every row.
        rows: weights.
        wanted: shares of the sets; of those that no row can be drawn of, the others have it.
        query: the set whose rows are drawn by their weight among all.
    """
    mass = {number: sum(w for s, w in zip(sets, rows, strict=True) if s == number) for number in set(sets)}
    there = {number: share for number, share in enumerate(wanted) if mass.get(number, 0.0) > 0}
    of_query = mass.get(query, 0.0) / sum(rows) if query is not None else 0.0
    found = []
    for number, weight in zip(sets, rows, strict=True):
        if number == query:
            found.append(weight / sum(rows))
        elif number in there:
            found.append((1 - of_query) * there[number] / sum(there.values()) * weight / mass[number])
        else:
            found.append(0.0)
    return found
