"""Forwards over rows of the pool in evaluation mode, whose numbers come together on rank 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora_scale.common.disk_arrays import blocks, new_array
from tsqlora_scale.common.random_streams import philox
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.tasks.batch import Batch
from tsqlora_scale.tasks.evaluation import evaluating, own_batches

#: rows whose numbers are gathered together
SHARD = 4096
#: hidden layers whose states are features, spread evenly from the embeddings to the last
LAYERS = 4
#: features of a layer; wider states are projected
WIDTH = 768
#: From the model and a batch of B rows to numbers of each, (B, width).
See = Callable[[nn.Module, Batch], Tensor]


def look(run: Run, rows: np.ndarray, see: See, *, what: str) -> np.ndarray | None:
    """What ``see`` says of the pool's ``rows``, (n, width) float32 in their order, on rank 0; None elsewhere.

    A collective. What a batch holds does not depend on the number of ranks.
    """
    module, world = run.engine.module, run.engine.world
    with world.together():
        lengths = run.task.lengths()[rows]
    found: np.ndarray | None = None
    with evaluating(module), run.progress(what) as bar:
        for block in blocks(len(rows), SHARD):
            order = rows[block][np.argsort(lengths[block], kind="stable")]
            own = []
            for some_rows, batch in own_batches(
                run.task, world, order, batch_size=run.config.train.eval_batch_size, split="train"
            ):
                seen = see(module, batch).float().cpu().numpy()
                if some_rows is not None:
                    own.append((some_rows, seen))
            gathered = world.gather_on_main(own)
            if gathered is not None:
                parts = [part for of_rank in gathered for part in of_rank]
                numbers, values = (np.concatenate(column) for column in zip(*parts, strict=True))
                if found is None:
                    found = new_array(len(rows) * values.shape[1], np.float32).reshape(len(rows), -1)
                place = np.argsort(rows[block], kind="stable")
                found[block.start + place] = values[np.argsort(numbers, kind="stable")]
            bar(block.stop, len(rows))
    return found


def class_scores(run: Run) -> See:
    """Log-probabilities of the classes, (B, C); a model's number, (B, 1); or the loss, (B, 1)."""
    kind, task = run.config.task.type, run.task

    def see(module: nn.Module, batch: Batch) -> Tensor:
        if task.gives_probabilities:
            _, found = task.predict_in_full(module, batch, synced=True)
            return torch.from_numpy(found).clamp(min=1e-30).log()
        if kind == "regression":
            return torch.tensor(task.predict(module, batch, synced=True), dtype=torch.float32)[:, None]
        return task.losses(module, batch).detach()[:, None]

    return see


def frozen_states(run: Run) -> np.ndarray | None:
    """Mean-pooled hidden states of some layers of the base, (n, layers x width) float32, on rank 0; None elsewhere.

    A fresh adapter changes nothing, so the model must not have been trained yet. A collective.
    """
    seed = run.config.run.seed
    projections: dict[int, Tensor] = {}

    def see(module: nn.Module, batch: Batch) -> Tensor:
        outputs: Any = module(**batch.inputs, output_hidden_states=True)
        states = getattr(outputs, "hidden_states", None) or outputs.decoder_hidden_states
        chosen = sorted({round(place) for place in np.linspace(0, len(states) - 1, LAYERS)})
        mask = batch.inputs.get("attention_mask")
        pooled = [_narrow(_mean(states[layer], mask), layer, seed, projections) for layer in chosen]
        return torch.cat(pooled, 1)

    return look(run, np.arange(len(run.task)), see, what="looking at the texts")


def _mean(states: Tensor, mask: Tensor | None) -> Tensor:
    """Of states (B, T, d) over the tokens that are attended, (B, d) float32."""
    if mask is None:
        return states.float().mean(1)
    weights = mask.unsqueeze(-1).float()
    return (states.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


def _narrow(states: Tensor, layer: int, seed: int, projections: dict[int, Tensor]) -> Tensor:
    """States (B, d) in :data:`WIDTH` dimensions by a random projection, where they have more."""
    width = states.shape[1]
    if width <= WIDTH:
        return states
    if layer not in projections:
        values = philox(seed, "audit projection", layer).standard_normal((width, WIDTH)) / WIDTH**0.5
        projections[layer] = torch.from_numpy(values).float().to(states.device)
    return states @ projections[layer]
