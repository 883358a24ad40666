"""What a pass over a pool has found: how good its samples are, which look mislabelled, which teach the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora_scale.common.files import written_whole
from tsqlora_scale.quality.draws.redundancy import groups, neighbours, similar_pairs
from tsqlora_scale.quality.scores.score_table import NEVER, ScoreTable
from tsqlora_scale.quality.scores.scorer import QualityScorer
from tsqlora_scale.quality.selectors.by_quality import QualitySelector
from tsqlora_scale.quality.selectors.selector import Selector
from tsqlora_scale.report.rankings import lowest
from tsqlora_scale.tasks import Task

TERMS = ("loss", "grad_norm", "delta_loss", "convergence", "quality")
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def summarise_selector(selector: Selector, task: Task, *, similarity: float, **told: Any) -> dict[str, Any]:
    """What ``selector`` has found: :func:`summarise`, or :func:`summarise_ratings`. On rank 0."""
    if isinstance(selector, QualitySelector):
        return summarise(selector.scorer, task, similarity=similarity, **told)
    assert selector.table is not None
    return summarise_ratings(selector.table, task, findings=getattr(selector, "findings", {}), **told)


def summarise(
    scorer: QualityScorer[Any], task: Task, *, top: int, similarity: float, steps: int, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Distribution of the terms, lists of samples, groups of similar ones. On rank 0.

    Where the pool has classes, samples are ranked within theirs (:func:`.lowest`).

    Args:
        scorer: after its pass.
        task: the pool that it has scored.
        top: samples of each list, and groups of similar ones.
        similarity: cosine of two gradients from which on two samples are said to teach the same.
        steps: optimizer steps before the pass.
        seconds: what the phases took.
    """
    table = scorer.table
    assert table is not None

    def entry(index: int) -> dict[str, Any]:
        return _entry(table, task, int(index))

    scored = table.scoring_pass != NEVER
    strata = task.strata()

    def ranked(values: np.ndarray, sign: int = 1) -> list[dict[str, Any]]:
        return [entry(i) for i in lowest(values, scored, strata, top, sign=sign)]

    summary: dict[str, Any] = {
        "pool": len(table),
        "scored": int(np.count_nonzero(scored)),
        "ranked within": _groups(task),
        "warm-up steps": steps,
        "measured": scorer.measured,
        "effective samples": round(table.effective_sample_size(), 1),
        "seconds": {name: round(value, 3) for name, value in sorted(seconds.items())},
        "quantiles": list(QUANTILES),
        "distribution": {
            term: np.nanquantile(getattr(table, term)[scored], QUANTILES).tolist()
            for term in TERMS
            if not np.isnan(getattr(table, term)[scored]).all()  # a pass of losses alone has no gradients
        },
        "best": ranked(table.quality, -1),
        "worst": ranked(table.quality),
    }
    if scorer.scoring.convergence == "loss_trend":
        return summary
    summary["most against the others"] = ranked(table.convergence)
    parts = list(scorer.parts)
    if not parts:  # a resumed run that was scored before, and kept no sketches
        return summary
    rows = np.concatenate([part.indices for part in parts])
    pairs = similar_pairs(np.concatenate([part.sketches for part in parts]), similarity, seed=scorer.seed)
    found = groups(pairs)
    summary["similarity"] = similarity
    summary["samples with a similar one"] = int((neighbours(pairs, len(rows)) > 1).sum())
    summary["similar"] = [
        {"samples": len(group), "first": [entry(rows[i]) for i in group[:3]]} for group in found[:top]
    ]
    return summary


def summarise_ratings(
    table: ScoreTable, task: Task, *, findings: Mapping[str, Any], top: int, steps: int, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """The same of a selector that rates the pool once: by its ratings, and by what it has made them of. On rank 0.

    Samples of the query that have joined the pool are in S anyway, and in no list.

    Args:
        findings: of the selector.
    """
    rated = table.scoring_pass != NEVER
    rated[len(table) - task.query_rows :] = False
    strata = task.strata()
    columns = {"quality": table.quality, **table.terms}

    def ranked(sign: int) -> list[dict[str, Any]]:
        found = []
        for index in lowest(table.quality, rated, strata, top, sign=sign):
            values = {name: round(float(column[index]), 4) for name, column in columns.items()}
            told = {"text": task.preview(int(index)), "answer": task.answer(int(index))}
            found.append({"sample_id": str(task.sample_ids[int(index)]), **told, **values})
        return found

    return {
        "pool": len(table),
        "scored": int(np.count_nonzero(table.scoring_pass != NEVER)),
        "ranked within": _groups(task),
        "warm-up steps": steps,
        "kept": int(np.count_nonzero(table.selected)),
        "findings": dict(findings),
        "seconds": {name: round(value, 3) for name, value in sorted(seconds.items())},
        "quantiles": list(QUANTILES),
        "columns": list(columns),
        "distribution": {name: np.nanquantile(column[rated], QUANTILES).tolist() for name, column in columns.items()},
        "best": ranked(-1),
        "worst": ranked(1),
    }


def _groups(task: Task) -> str:
    """What ``task.strata()`` are, in words."""
    if task.sets is not None and task.sets.shares is not None:
        return "sets" if task.class_ids() is None else "sets and labels"
    return "the pool" if task.strata() is None else "labels"


def _entry(table: ScoreTable, task: Task, index: int) -> dict[str, Any]:
    text, answer = task.preview(index), task.answer(index)
    raw = {term: float(getattr(table, term)[index]) for term in TERMS}
    values = {term: None if np.isnan(value) else round(value, 4) for term, value in raw.items()}
    return {"sample_id": str(task.sample_ids[index]), "text": text, "answer": answer, **values}


def write_summary(summary: dict[str, Any], folder: Path) -> None:
    """Write ``folder/scores.json``, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with written_whole(folder / "scores.json") as partial:
        partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
