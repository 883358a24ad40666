"""How often a run has drawn from each data set of a mixture."""

from __future__ import annotations

from typing import Any

import numpy as np

from tsqlora_scale.tasks.rows.mixed_sets import MixedSets


class DrawCounts:
    """Counts the draws by set; nothing where the pool is one data set.

    Args:
        sets: of the pool.
    """

    def __init__(self, sets: MixedSets | None) -> None:
        self._sets = sets
        self._counts = np.zeros(0 if sets is None else len(sets.names), dtype=np.int64)

    def add(self, rows: np.ndarray) -> None:
        """Count the samples of a step, pool rows (batch_size,)."""
        if self._sets is not None:
            self._counts += self._sets.counts(rows)

    def by_set(self) -> dict[str, dict[str, Any]] | None:
        """Of every set its samples in the pool (``pool``), how many were drawn (``drawn``), which part that is of the
        draws from the sets (``share``), and which was asked for (``asked``, None where none was). Of the query's rows,
        which are of no set, how many."""
        if self._sets is None:
            return None
        sizes, count = self._sets.sizes(), self._sets.count
        total = max(int(self._counts[:count].sum()), 1)
        asked: list[float | None] = [None] * len(sizes)
        if self._sets.shares is not None:
            asked[: len(self._sets.shares)] = [round(share, 6) for share in self._sets.shares.tolist()]
        return {
            name: {
                "pool": int(size),
                "drawn": int(drawn),
                "share": round(int(drawn) / total, 6) if place < count else None,
                "asked": share,
            }
            for place, (name, size, drawn, share) in enumerate(
                zip(self._sets.names, sizes, self._counts, asked, strict=True)
            )
        }

    def state_dict(self) -> list[int]:
        """The counts."""
        counts: list[int] = self._counts.tolist()
        return counts

    def load_state_dict(self, state: list[int]) -> None:
        """Go on from a :meth:`state_dict`."""
        self._counts[:] = state
