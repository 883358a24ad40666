"""Scoring alone: how good is every sample of a pool, which look mislabelled, which say the same as others."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tsqlora_scale.common.files import written_whole
from tsqlora_scale.quality.draws.redundancy import groups, neighbours, similar_pairs
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.training import score_pool, stop_if_asked, train_step

TERMS = ("loss", "grad_norm", "delta_loss", "convergence", "quality")
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def score(run: Run, *, top: int, similarity: float, warm_up: bool) -> dict[str, Any]:
    """Warm up (at step 0 the scores are blind), score the pool, and say what was found.

    Args:
        top: samples of each list, and groups of similar ones.
        similarity: cosine of two gradients from which on two samples are said to teach the same.
        warm_up: whether to take the config's ``scoring.warmup_steps`` first; not for an adapter that was trained.

    Returns:
        What ``scores/summary.json`` holds; empty on other ranks than 0.

    Raises:
        UserError: on every rank, when the scores cannot be written.
    """
    warm_up_and_score(run, warm_up=warm_up)
    summary = summarise(run, top=top, similarity=similarity) if run.is_main else {}
    folder = run.record.folder / "scores"

    def write() -> None:
        run.write_scores()  # again: where the pass could not, no checkpoint holds them
        with written_whole(folder / "summary.json") as partial:
            partial.write_text(json.dumps(summary, indent=1) + "\n")

    run.write_on_main(f"the scores, {str(folder)!r},", write)
    return summary


def warm_up_and_score(run: Run, *, warm_up: bool = True) -> None:
    """Take the plan's steps on uniform samples, if asked to, and score the pool once."""
    assert run.plan.scoring_step is not None
    steps = run.plan.scoring_step if warm_up else 0
    if run.first_quality is None:
        with run.record, run.watchdog, run.progress("warm-up") as bar:
            while run.step < steps:
                loss = train_step(run)
                bar(run.step, steps, f"loss {loss:.4f}")
                stop_if_asked(run)
            score_pool(run)


def summarise(run: Run, *, top: int, similarity: float) -> dict[str, Any]:
    """Distribution of the terms, lists of samples, groups of similar ones. On rank 0."""
    assert run.scorer is not None and run.scorer.table is not None
    scorer, table = run.scorer, run.scorer.table
    scored = np.flatnonzero(table.scoring_pass >= 0)
    by_quality = scored[np.argsort(-table.quality[scored], kind="stable")]
    summary: dict[str, Any] = {
        "pool": len(table),
        "scored": len(scored),
        "warm-up steps": run.step,
        "effective samples": round(table.effective_sample_size(), 1),
        "seconds": {name: round(value, 3) for name, value in sorted(run.record.seconds.items())},
        "quantiles": list(QUANTILES),
        "distribution": {term: np.nanquantile(getattr(table, term)[scored], QUANTILES).tolist() for term in TERMS},
        "best": [_entry(run, i) for i in by_quality[:top]],
        "worst": [_entry(run, i) for i in by_quality[::-1][:top]],
    }
    if scorer.scoring.convergence == "loss_trend":
        return summary
    by_convergence = scored[np.argsort(table.convergence[scored], kind="stable")]
    summary["most against the others"] = [_entry(run, i) for i in by_convergence[:top]]
    parts = list(scorer.parts)
    if not parts:  # a resumed run that was scored before, and kept no sketches
        return summary
    rows = np.concatenate([part.indices for part in parts])
    pairs = similar_pairs(np.concatenate([part.sketches for part in parts]), similarity, seed=scorer.seed)
    found = groups(pairs)
    summary["similarity"] = similarity
    summary["samples with a similar one"] = int((neighbours(pairs, len(rows)) > 1).sum())
    summary["similar"] = [
        {"samples": len(group), "first": [_entry(run, rows[i]) for i in group[:3]]} for group in found[:top]
    ]
    return summary


def _entry(run: Run, index: int) -> dict[str, Any]:
    assert run.scorer is not None and run.scorer.table is not None
    table = run.scorer.table
    text, answer = run.task.preview("train", int(index)), run.task.answer("train", int(index))
    values = {term: round(float(getattr(table, term)[index]), 4) for term in TERMS}
    return {"sample_id": str(run.scorer.sample_ids[index]), "text": text, "answer": answer, **values}
