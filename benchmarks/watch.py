"""Looks at something again and again while work is done."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Any


class Watch(ABC):
    """Looks a hundred times a second, in a thread, while it is open."""

    def __init__(self) -> None:
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Any:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ends.wait(0.01):
            self.look()

    @abstractmethod
    def look(self) -> None:
        """See what there is now. In the watch's own thread."""
