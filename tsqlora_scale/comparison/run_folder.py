"""What figures need of a run folder, of whatever run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.comparison.trial_outcome import read_result

#: Parts of a layer's name that say nothing beside the others.
SILENT = ("attention", "self", "self_attn", "self_attention", "mlp", "dense", "layer", "layers", "SelfAttention")


@dataclass(frozen=True)
class LayerPlace:
    """A layer by its block's number and its kind within the block."""

    block: int
    kind: str


@dataclass(frozen=True)
class FinishedRun:
    """A run folder.

    Attributes:
        label: for legends.
        result: ``result.json``.
        events: the lines of ``ranks.jsonl``.
    """

    folder: Path
    label: str
    result: dict[str, Any]
    events: list[dict[str, Any]]

    @property
    def ranks_change(self) -> bool:
        """Whether there are events with sensitivities."""
        return bool(self.events) and bool(self.events[-1].get("sensitivity"))

    def scores(self) -> dict[str, np.ndarray]:
        """Loss, gradient norm and quality of the samples that the last pass has scored, as far as it measured them.

        Raises:
            UserError: the score file is damaged.
        """
        if not any((self.folder / "scores").glob("pass-*.parquet")):
            return {}
        from tsqlora_scale.quality.scores.score_table import NEVER, ScoreTable

        table, _ = ScoreTable.read(self.folder / "scores")
        scored = table.scoring_pass != NEVER
        named = {"loss": table.loss, "gradient norm": table.grad_norm, "quality Q": table.quality}
        columns = {name: values[scored] for name, values in named.items()}
        return {name: values[np.isfinite(values)] for name, values in columns.items() if np.isfinite(values).any()}


def read_run(folder: Path, label: str | None = None) -> FinishedRun:
    """Read a run folder.

    Raises:
        UserError: it holds no finished run.
    """
    result = read_result(folder)
    if result is None:
        raise UserError(f"{str(folder)!r}: no finished run is there (no result.json); give the folder of one")
    return FinishedRun(folder, label or str(result.get("name", folder.name)), result, _lines(folder / "ranks.jsonl"))


def places_of(names: list[str]) -> dict[str, LayerPlace]:
    """Block and kind of every layer; kinds are as short as they can be and still differ."""
    parsed: dict[str, tuple[int, str, tuple[str, ...]]] = {}
    for name in names:
        parts = name.split(".")
        numbers = [place for place, part in enumerate(parts) if re.fullmatch(r"\d+", part)]
        first = numbers[0] if numbers else len(parts)
        stack = next((part for part in parts[:first] if part in ("encoder", "decoder")), "")
        parsed[name] = (int(parts[first]) if numbers else 0, stack, tuple(parts[first + 1 :] if numbers else parts))
    has_stacks = len({stack for _, stack, _ in parsed.values()}) > 1
    short = {inner: _short(inner) for _, _, inner in parsed.values()}
    unclear = {kind for kind in short.values() if list(short.values()).count(kind) > 1}
    places = {}
    for name, (block, stack, inner) in parsed.items():
        kind = ".".join(inner) if short[inner] in unclear else short[inner]
        places[name] = LayerPlace(block, f"{stack} {kind}" if has_stacks and stack else kind)
    return places


def _short(inner: tuple[str, ...]) -> str:
    """``attention.output.dense`` -> ``attention.output``, ``attention.self.query`` -> ``query``."""
    kept = [part for part in inner if part not in SILENT and not part.isdigit()]
    if kept == ["output"] and inner[0] == "attention":
        return "attention.output"
    return ".".join(kept) or ".".join(inner)


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    try:
        for text in path.read_text(encoding="utf-8").splitlines():
            found.append(json.loads(text))
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{path}: line {len(found) + 1} is no JSON ({error}); remove it") from None
    return found
