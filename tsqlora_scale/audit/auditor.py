"""An audit from its passes to its findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora_scale.audit.cross_fit import cross_fitted_scores
from tsqlora_scale.audit.findings import WEAK_EXPLAINED, WEAK_GAIN, Findings
from tsqlora_scale.audit.fold_plan import plan_folds
from tsqlora_scale.audit.label_noise import judge_labels
from tsqlora_scale.audit.number_noise import judge_numbers
from tsqlora_scale.audit.passes import frozen_states, off_query
from tsqlora_scale.audit.ridge import left_out_predictions
from tsqlora_scale.common.copies import copy_groups, same_texts, text_groups
from tsqlora_scale.common.disk_arrays import blocks
from tsqlora_scale.common.random_streams import philox
from tsqlora_scale.quality.draws.redundancy import linked
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.tasks.rows.wanted import TARGET_KEY, text_columns

#: samples that a regression on features learns from, as a bound of its work; all are predicted
LEARNED = 10_000
#: rows of text that are in memory at once
ROWS = 2**14


def audit_pool(run: Run, *, similarity: float, parts: Path) -> Findings | None:
    """Judge every sample of a run's pool by what has not seen it. On rank 0; None elsewhere. A collective.

    Rows of the query that are trained on, too, help to judge and are not judged: their labels are taken for right.

    Args:
        run: fresh: its adapter has learned nothing yet.
        similarity: cosine of two samples' features from which on they are nearly the same.
        parts: where finished folds are kept.

    Raises:
        UserError: a model has diverged, or the disk has no room.
        Stopped: on every rank.
    """
    config, world = run.config, run.engine.world
    sources: dict[str, np.ndarray] = {}
    run.stop.interrupts_scoring = True  # nothing is lost but the pass, of which the base's own is kept
    with run.record, run.watchdog:
        states = None
        if config.audits_features:
            with run.record.phase("features"):
                states = frozen_states(run, folder=parts / "texts")
        off = None
        if run.task.query is not None:
            with run.record.phase("query"):
                off = off_query(run)
        exact = near = np.empty((0, 2), dtype=np.int64)
        if run.is_main:
            exact = same_texts(texts_of_pool(run))
            near = exact if states is None else nearly_same(states, exact, similarity, seed=config.run.seed)
        groups = folds = same = None
        if run.is_main:
            groups = copy_groups(np.concatenate([exact, near]), len(run.task))
            same = copy_groups(exact, len(run.task))
            folds = plan_folds(groups, run.task.strata(), config.scoring.folds, seed=config.run.seed, copies=same)
        if states is not None and groups is not None:
            with run.record.phase("regression"):
                sources["features"] = by_features(run, states, groups)
            del states
        if config.audits_adapters:
            folds = world.broadcast(folds)
            assert folds is not None
            with run.record.phase("adapters"):
                scores = cross_fitted_scores(run, folds, folder=parts)
            sources["adapters"] = scores.astype(np.float64)
        if groups is None or same is None:
            return None
        size = len(run.task) - run.task.query_rows
        with run.record.phase("judging"):
            judged = judge(run, {name: scores[:size] for name, scores in sources.items()})
            if TARGET_KEY in text_columns(run.config.task):
                groups, same = with_same_answer(run, same, near)
    return Findings(
        ids=run.task.sample_ids,
        first=groups[:size],
        same=same[:size],
        off_query=None if off is None else off[:size],
        seconds=dict(run.record.seconds),
        **judged,
    )


def texts_of_pool(run: Run, *, answered: bool = False) -> Iterator[str]:
    """What is read of every sample of the pool, in order; ``answered``: with the answer, where it is a text."""
    named = text_columns(run.config.task)
    return _cells(run, [name for key, name in named.items() if answered or key != TARGET_KEY])


def _cells(run: Run, names: Sequence[str]) -> Iterator[str]:
    """The cells of some columns, joined, of every sample of the pool, in order."""
    for block in blocks(len(run.task), ROWS):
        table = run.task.given(block)
        for cells in zip(*(table.column(name).to_pylist() for name in names), strict=True):
            yield "\x1f".join("" if cell is None else str(cell) for cell in cells)


def with_same_answer(run: Run, same: np.ndarray, near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first sample of each one's group of copies and near-copies, and of copies, (n,) both, of a task whose answers
    are texts: one that is asked for another answer is no copy.

    Args:
        same: the first sample of which the same is read, (n,).
        near: pairs (m, 2) of samples of which nearly the same is read.
    """
    answers = text_groups([cell] for cell in _cells(run, [text_columns(run.config.task)[TARGET_KEY]]))
    _, first, member = np.unique(np.column_stack([same, answers]), axis=0, return_index=True, return_inverse=True)
    same = first[member.reshape(-1)]
    pairs = [np.column_stack([same, np.arange(len(same))]), near[answers[near[:, 0]] == answers[near[:, 1]]]]
    return copy_groups(np.concatenate(pairs), len(same)), same


def nearly_same(states: np.ndarray, exact: np.ndarray, similarity: float, *, seed: int) -> np.ndarray:
    """Pairs (m, 2), each of a group's first sample and another one: groups are samples that a chain of cosines of at
    least ``similarity`` links, of features of variance 1; of samples of which the same is read, the first alone.

    Args:
        exact: pairs of samples of which the same is read, the second of which each is in one alone.
    """
    is_first = np.ones(len(states), dtype=bool)
    is_first[exact[:, 1]] = False
    rows = np.flatnonzero(is_first)
    leaders = linked(of_one_variance(states, rows), similarity, seed=seed)
    others = np.flatnonzero(leaders != np.arange(len(leaders)))
    found: np.ndarray = np.column_stack([rows[leaders[others]], rows[others]])
    return found


def of_one_variance(states: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows of features (n, width), each feature of mean 0 and variance 1 over all rows."""
    middle, spread = states.mean(0), states.std(0)
    chosen = states if len(rows) == len(states) else states[rows]
    scaled: np.ndarray = (chosen - middle) / np.where(spread > 1e-6 * spread.max(initial=0.0), spread, np.inf)
    return scaled


def by_features(run: Run, states: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """What regressions on the frozen features say, (n, C) or (n, 1)."""
    task = run.config.task
    labels = np.asarray(run.task.references(np.arange(len(run.task))))
    targets = np.eye(task.num_labels)[labels] if task.type == "classification" else labels[:, None].astype(float)
    fitted = None
    if len(labels) > LEARNED:
        fitted = np.zeros(len(labels), dtype=bool)
        fitted[philox(run.config.run.seed, "audit features").permutation(len(labels))[:LEARNED]] = True
    predictions, _ = left_out_predictions(states, targets, groups, fitted=fitted)
    return predictions


def judge(run: Run, sources: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of :class:`.Findings` that follow from the sources' scores of the first n samples, (n, width) each."""
    task = run.config.task
    scores, names = np.stack(list(sources.values())), list(sources)
    if task.type not in ("classification", "regression"):
        losses = scores[0][:, 0]
        nothing: dict[str, Any] = dict.fromkeys(("labels", "names", "wrong", "suggested", "share", "flows"))
        return {
            **nothing,
            "kind": task.type,
            "suspicion": losses,
            "strength": {"loss": float(losses.mean())},
            "sources": dict.fromkeys(names, 1.0),
        }
    answers = np.asarray(run.task.references(np.arange(scores.shape[1])))
    if task.type == "regression":
        numbers = judge_numbers(scores[:, :, 0], answers)
        return {
            "kind": task.type,
            "labels": answers.astype(np.float64),
            "names": None,
            "suspicion": np.abs(answers - numbers.predicted) / numbers.spread,
            "wrong": numbers.wrong,
            "suggested": numbers.predicted,
            "share": numbers.share,
            "flows": None,
            "strength": {"explained variance": numbers.explained, "weak": numbers.explained < WEAK_EXPLAINED},
            "sources": dict.fromkeys(names, 1.0),
        }
    noise = judge_labels(scores, answers, seed=run.config.run.seed)
    others = noise.classes.copy()
    others[np.arange(len(answers)), answers] = -1.0
    flows = np.zeros((task.num_labels, task.num_labels))
    np.add.at(flows, answers, noise.classes)
    classes = task.labels if isinstance(task.labels, list) else [str(i) for i in range(task.num_labels)]
    return {
        "kind": task.type,
        "labels": answers,
        "names": classes,
        "suspicion": 1 - noise.given,
        "wrong": noise.wrong,
        "suggested": others.argmax(1),
        "share": noise.share,
        "flows": flows,
        "strength": {"gain": noise.gain, "weak": noise.gain < WEAK_GAIN},
        "sources": dict(zip(names, noise.weights.tolist(), strict=True)),
    }
