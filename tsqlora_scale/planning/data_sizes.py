"""How many rows a run has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataSizes:
    """Rows of a run.

    Attributes:
        pool: samples of the pool, the query's that are trained on among them.
        query: of these, the query's.
        held_out: of all held-out sets.
    """

    pool: int
    query: int = 0
    held_out: int = 0
