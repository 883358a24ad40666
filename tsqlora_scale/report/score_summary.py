"""What a pass over a pool has found: how good its samples are, which look mislabelled, which teach the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora_scale.common.files import written_whole
from tsqlora_scale.quality.draws.redundancy import groups, neighbours, similar_pairs
from tsqlora_scale.quality.scores.score_table import ScoreTable
from tsqlora_scale.quality.scores.scorer import QualityScorer
from tsqlora_scale.tasks import Task

TERMS = ("loss", "grad_norm", "delta_loss", "convergence", "quality")
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def summarise(
    scorer: QualityScorer[Any], task: Task, *, top: int, similarity: float, steps: int, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Distribution of the terms, lists of samples, groups of similar ones. On rank 0.

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

    scored = np.flatnonzero(table.scoring_pass >= 0)
    by_quality = scored[np.argsort(-table.quality[scored], kind="stable")]
    summary: dict[str, Any] = {
        "pool": len(table),
        "scored": len(scored),
        "warm-up steps": steps,
        "effective samples": round(table.effective_sample_size(), 1),
        "seconds": {name: round(value, 3) for name, value in sorted(seconds.items())},
        "quantiles": list(QUANTILES),
        "distribution": {term: np.nanquantile(getattr(table, term)[scored], QUANTILES).tolist() for term in TERMS},
        "best": [entry(i) for i in by_quality[:top]],
        "worst": [entry(i) for i in by_quality[::-1][:top]],
    }
    if scorer.scoring.convergence == "loss_trend":
        return summary
    by_convergence = scored[np.argsort(table.convergence[scored], kind="stable")]
    summary["most against the others"] = [entry(i) for i in by_convergence[:top]]
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


def _entry(table: ScoreTable, task: Task, index: int) -> dict[str, Any]:
    text, answer = task.preview(index), task.answer(index)
    values = {term: round(float(getattr(table, term)[index]), 4) for term in TERMS}
    return {"sample_id": str(task.sample_ids[index]), "text": text, "answer": answer, **values}


def write_summary(summary: dict[str, Any], folder: Path) -> None:
    """Write ``folder/summary.json``, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with written_whole(folder / "summary.json") as partial:
        partial.write_text(json.dumps(summary, indent=1) + "\n")
