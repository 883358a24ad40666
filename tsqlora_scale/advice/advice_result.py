"""What advice gives back to Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class AdviceResult:
    """What a look has found. The same on every rank.

    Attributes:
        file: ``advice/advice.json`` of the run folder.
        verdict: ``query``, ``query alone`` or ``even``.
        reasons: a line each.
        config: the keys of the config to set, by section.
        summary: all that the file holds.
    """

    file: Path
    verdict: str
    reasons: list[str]
    config: dict[str, Any]
    summary: dict[str, Any]
