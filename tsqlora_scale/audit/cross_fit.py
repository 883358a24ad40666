"""A pool judged by adapters that have not seen it: one training for every fold, on any engine."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tsqlora_scale.audit.passes import class_scores, look
from tsqlora_scale.audit.trial_step import trial_step
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.files import WRITE_ERRORS, written_whole
from tsqlora_scale.engine.sharded import write_parameter
from tsqlora_scale.engine.train_state import ParamState, TrainState
from tsqlora_scale.quality import BatchSampler
from tsqlora_scale.run.training_run import Run

#: how often in a fold's training its held-out rows are looked at …
LOOKS = 8
#: … and how many times in a row they may become worse before it ends
PATIENCE = 2


def cross_fitted_scores(run: Run, folds: np.ndarray, *, folder: Path) -> np.ndarray:
    """What adapters say of the rows that they have not been trained on, (n, width) float32, the same on every rank.

    For every fold a fresh adapter is trained on the other folds, at most as long as the config trains, and looked at
    :data:`LOOKS` times: the state is kept that gives the held-out fold the smallest loss, and training ends when it
    only grows. Held-out labels may be wrong, too, and choose nothing but the number of steps.

    A collective. A fold that is finished is kept in ``folder``, and not trained again.

    Args:
        folds: of every row of the pool, (n,), the same on every rank.

    Raises:
        UserError: a fold's model has diverged.
        Stopped: on every rank, between two steps.
    """
    initial = run.engine.gather()
    parts = FoldParts(folder, run, folds)
    found: np.ndarray | None = None
    count = int(folds.max()) + 1
    for fold in range(count):
        rows = np.flatnonzero(folds == fold)
        kept = run.engine.world.broadcast(parts.read(fold) if run.is_main else None)
        if kept is None:
            kept = train_fold(run, np.flatnonzero(folds != fold), rows, initial, name=f"fold {fold + 1} of {count}")
            if run.is_main:
                parts.write(fold, kept)
        found = np.empty((len(folds), kept.shape[1]), dtype=np.float32) if found is None else found
        found[rows] = kept
    assert found is not None
    return found


def train_fold(run: Run, learned: np.ndarray, held_out: np.ndarray, initial: TrainState, *, name: str) -> np.ndarray:
    """The best that an adapter trained on the rows ``learned`` says of ``held_out``, (k, width). A collective."""
    engine, config, last = run.engine, run.config, run.plan.total_steps
    engine.rebuild(lambda module, _: restored(module, initial))
    sampler = BatchSampler(learned, None, batch_size=config.train.batch_size, seed=config.run.seed, replacement=False)
    every, best, stale = math.ceil(last / LOOKS), math.inf, 0
    kept: np.ndarray | None = None
    with run.progress(name) as bar:
        for step in range(last):
            result = trial_step(run, sampler.draw(step), step=step, steps=last)
            bar(step + 1, last, f"loss {result.loss:.4f}")
            if result.stop:
                raise run.stop.stopped(f"stopped on request in {name}; finished folds are kept", engine.world)
            if (step + 1) % every and step + 1 < last:
                continue
            scores = look(run, held_out, class_scores(run), what=f"{name}: looking at it")
            loss = engine.world.broadcast(held_out_loss(run, held_out, scores))
            run.record.metrics(step=step + 1, fold=name, loss=result.loss, held_out=loss)
            if loss < best:
                best, stale, kept = loss, 0, scores
            else:
                stale += 1
            if stale >= PATIENCE:
                break
    if kept is None:
        raise UserError(f"the model of {name} has diverged; lower train.lr={config.train.lr:g} or use model.dtype=fp32")
    return kept


def held_out_loss(run: Run, rows: np.ndarray, scores: np.ndarray) -> float:
    """Mean loss of the rows (k,) by what a model says of them, (k, width)."""
    if run.task.gives_probabilities:
        labels = np.asarray(run.task.references(rows), dtype=np.int64)
        return float(-scores[np.arange(len(rows)), labels].mean())
    if run.config.task.type == "regression":
        return float(np.square(scores[:, 0] - np.asarray(run.task.references(rows))).mean())
    return float(scores.mean())


def restored(module: nn.Module, initial: TrainState) -> TrainState:
    """The values that training began from, written into ``module``. With ZeRO-3 a collective."""
    params = dict(module.named_parameters())
    for name, entry in sorted(initial.params.items()):
        write_parameter(params[name], entry.value)
    return TrainState({name: ParamState.fresh(entry.value.clone()) for name, entry in initial.params.items()})


class FoldParts:
    """What finished folds have said, on disk. Used on rank 0.

    Args:
        folder: where; made when the first fold is written.
        run: by whose config and pool parts are told from those of others.
        folds: of every row.
    """

    def __init__(self, folder: Path, run: Run, folds: np.ndarray) -> None:
        self._folder = folder
        sections = run.config.model_dump(mode="json", include={"model", "task", "adapter", "train"})
        key: dict[str, Any] = {
            **sections,
            "seed": run.config.run.seed,
            "pool": run.task.digest(),
            "folds": hashlib.sha256(np.ascontiguousarray(folds).data).hexdigest(),
        }
        self._digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    def read(self, fold: int) -> np.ndarray | None:
        """A fold's scores, if they are there whole."""
        try:
            scores: np.ndarray = np.load(self._file(fold))
        except (OSError, ValueError, EOFError):
            return None
        return scores

    def write(self, fold: int, scores: np.ndarray) -> None:
        """Keep a fold's scores, where there is room: else a killed audit trains it again."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with written_whole(self._file(fold)) as partial, Path(partial).open("wb") as file:
                np.save(file, scores)
        except WRITE_ERRORS:
            return

    def _file(self, fold: int) -> Path:
        return self._folder / f"{self._digest}-{fold:03d}.npy"
