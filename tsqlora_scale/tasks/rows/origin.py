"""Where rows come from, in the words of messages."""

from __future__ import annotations

import bisect
from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """A file, several files one after another, or a split of a hub dataset.

    Attributes:
        name: of the whole.
        files: names of the files, where there are several,
        ends: and the number of rows up to the end of each.
    """

    name: str
    files: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name

    def row(self, row: int) -> str:
        """``FILE, row N``, counted from 1 in its file, of a row counted from 0."""
        name, number = self._place(row)
        return f"{name}, row {number}"

    def rows(self, first: int, second: int) -> str:
        """Two rows."""
        (name, number), (other, another) = self._place(first), self._place(second)
        if name == other:
            return f"{name}, rows {number} and {another}"
        return f"{name}, row {number}, and {other}, row {another}"

    def _place(self, row: int) -> tuple[str, int]:
        if not self.files:
            return self.name, row + 1
        file = bisect.bisect_right(self.ends, row)
        return self.files[file], row + 1 - (self.ends[file - 1] if file else 0)
