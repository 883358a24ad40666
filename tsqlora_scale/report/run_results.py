"""What a call gives back to a program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainResult:
    """What a finished run has given.

    Attributes:
        folder: the run folder.
        adapter: the adapter in it, of the last step or the best (``train.keep``); ``peft.PeftModel.from_pretrained``
            opens it.
        metrics: of that adapter on the held-out set; empty without one.
        metrics_before: the same before the first step; empty without ``train.eval_on_start``, too.
        ranks: of every adapted layer in that adapter.
        seconds: wall seconds by phase.
        record: all that ``result.json`` holds.
    """

    folder: Path
    adapter: Path
    metrics: dict[str, float]
    metrics_before: dict[str, float]
    ranks: dict[str, int]
    seconds: dict[str, float]
    record: dict[str, Any]


@dataclass(frozen=True)
class ScoreResult:
    """What a scored pool looks like.

    Attributes:
        folder: where the scores lie, as parquet and nothing else; :meth:`.ScoreTable.read` reads them, and so do pandas
            and ``datasets``.
        summary: distribution of the terms, best and worst samples, groups of similar ones, as ``scores.json`` in the
            run folder holds it; empty on other ranks than 0.
        file: the parquet file, with every sample's id, text and answer beside its scores; None on other ranks than 0.
    """

    folder: Path
    summary: dict[str, Any]
    file: Path | None = None


@dataclass(frozen=True)
class PredictResult:
    """What a prediction has written.

    Attributes:
        out: the file.
        rows: its rows, as many as the data has.
        empty: those without an answer, having no text.
    """

    out: Path
    rows: int
    empty: int
