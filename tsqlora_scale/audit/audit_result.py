"""What an audit gives back to Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class AuditResult:
    """What an audit has left.

    Attributes:
        folder: ``audit/`` of the run folder.
        summary: as ``summary.json`` there holds it; empty on other ranks than 0.
        suspects: the most suspect samples: id, text, label, suggested label, probability; empty on other ranks.
    """

    folder: Path
    summary: dict[str, Any]
    suspects: list[dict[str, Any]]

    @property
    def page(self) -> Path:
        """The page to walk through."""
        return self.folder / "index.html"

    @property
    def fixes(self) -> Path:
        """The csv of samples to look at; ``task.dataset.exclude`` takes it."""
        return self.folder / "fixes.csv"

    @property
    def table(self) -> Path:
        """The whole pool with what was found, as parquet; as a pool it has weights to draw by."""
        return self.folder / "audit.parquet"
