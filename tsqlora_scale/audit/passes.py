"""What is seen of the pool's rows by forwards alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora_scale.common.disk_arrays import blocks
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.random_streams import philox
from tsqlora_scale.quality.features.forward_pass import ForwardPass, Look
from tsqlora_scale.quality.features.hidden_states import mean_states, with_states
from tsqlora_scale.quality.query.query_rater import QueryRater
from tsqlora_scale.report.progress import Progress
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.tasks.batch import Batch, class_logits

#: hidden layers whose states are features, spread evenly from the embeddings to the last
LAYERS = 4
#: features of a layer; wider states are projected
WIDTH = 768


def look(
    run: Run, rows: np.ndarray, see: Look, *, what: str, frozen: bool = False, folder: Path | None = None
) -> np.ndarray:
    """What ``see`` says of the pool's ``rows``, (n, width) float32 in their order, the same on every rank. A
    collective.

    Args:
        what: it is that is done, for progress.
        frozen: by the base alone, without its adapters.
        folder: where what is seen is kept while the pass runs; only of the base.

    Raises:
        Stopped: on every rank, where the run's request to stop may end a pass.
    """
    config = run.config
    with run.progress(what) as bar:
        forward = ForwardPass(
            run.engine.module,
            run.engine.world,
            batch_size=config.train.eval_batch_size,
            frozen=frozen,
            progress=_stoppable(run, bar),
            folder=folder,
        )
        told = config.model_dump(mode="json", include={"model", "task"})
        whole = f"{what} {config.model.weights_name} {config.run.seed} {json.dumps(told, sort_keys=True)}"
        return forward.run(run.task, rows, see, name=whole)


def _stoppable(run: Run, bar: Progress) -> Callable[[int, int], None]:
    """Progress that looks after each batch whether some rank was asked to stop."""

    def told(done: int, total: int) -> None:
        bar(done, total)
        run.stop.during_scoring(run.engine.world)

    return told


def class_scores(run: Run) -> Look:
    """Log-probabilities of the classes, (B, C); a model's number, (B, 1); or the loss, (B, 1)."""
    task = run.task

    def see(module: nn.Module, batch: Batch) -> Tensor:
        if task.gives_probabilities:
            return class_logits(module(**batch.inputs).logits, batch).float().log_softmax(-1)
        if run.config.task.type == "regression":
            return torch.tensor(task.predict(module, batch, synced=True), dtype=torch.float32)[:, None]
        return task.losses(module, batch)[:, None]

    return see


class StateLook:
    """Mean hidden states of :data:`LAYERS` layers of the base: of a batch (B, layers x width) float32.

    Args:
        seed: of the run; wide states are projected by it.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._projections = seed, dict[int, Tensor]()

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        """By one forward."""
        return self.seen(with_states(module, batch), batch)

    def seen(self, outputs: Any, batch: Batch) -> Tensor:
        """The same of a forward's ``outputs``."""
        states = mean_states(outputs, batch)[:, :, 0]
        chosen = sorted({round(place) for place in np.linspace(0, states.shape[1] - 1, LAYERS).tolist()})
        return torch.cat([_narrow(states[:, layer], layer, self._seed, self._projections) for layer in chosen], 1)


def frozen_states(run: Run, *, folder: Path | None = None) -> np.ndarray:
    """What :class:`StateLook` sees of the pool, (n, layers x width) float32. A collective.

    Args:
        folder: where it is kept while the pass runs, so that a killed one goes on.

    Raises:
        UserError: it is not finite; on every rank.
        Stopped: on every rank, where the run's request to stop may end a pass.
    """
    see = StateLook(run.config.run.seed)
    states = look(run, np.arange(len(run.task)), see, what="looking at the texts", frozen=True, folder=folder)
    with run.engine.world.together():
        if not all(np.isfinite(states[block]).all() for block in blocks(len(states), 2**14)):
            raise UserError(
                f"model.dtype={run.config.model.dtype}: the hidden states of the base are not finite, and an audit "
                "needs them; its weights are damaged, or it computes in too coarse a type: use model.dtype=fp32, or "
                "scoring.audit=adapters"
            )
    return states


def off_query(run: Run) -> np.ndarray | None:
    """The probability that a row of the pool is none of what ``task.query`` wants, (n,), 0 for the query's own; None
    without a query, or where it does not stand out of the pool. A collective."""
    if run.task.query is None:
        return None
    config = run.config
    with run.progress("looking for what the query wants") as bar:
        rater = QueryRater(
            config.scoring,
            pool=run.task,
            world=run.engine.world,
            seed=config.run.seed,
            model_name=config.model.weights_name,
            progress=_stoppable(run, bar),
        )
        found = rater.rate(run.engine.module)
    if not found.standing.is_evident:
        return None
    off: np.ndarray = 1 - np.asarray(found.wanted)
    off[len(run.task) - run.task.query_rows :] = 0.0
    return off


def _narrow(states: Tensor, layer: int, seed: int, projections: dict[int, Tensor]) -> Tensor:
    """States (B, d) in :data:`WIDTH` dimensions by a random projection, where they have more."""
    width = states.shape[1]
    if width <= WIDTH:
        return states
    if layer not in projections:
        values = philox(seed, "audit projection", layer).standard_normal((width, WIDTH)) / WIDTH**0.5
        projections[layer] = torch.from_numpy(values).float().to(states.device)
    return states @ projections[layer]
