"""Slow and obviously correct: one sample at a time, without padding, by the model's own loss; greedy search by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsqlora_scale.tasks import IGNORED, Batch


def alone(batch: Batch, i: int) -> tuple[dict[str, Tensor], Tensor]:
    """Sample ``i`` as a batch of one without padding, and its labels; decoder inputs are left to the model."""
    length = int(batch.inputs["attention_mask"][i].sum())
    inputs = {n: t[i : i + 1, :length] for n, t in batch.inputs.items() if n != "decoder_input_ids"}
    labels = batch.targets[i : i + 1]
    if labels.dim() == 2 and "decoder_input_ids" in batch.inputs:
        labels = labels[:, : int((labels != IGNORED).sum())]
    elif labels.dim() == 2:
        labels = labels[:, :length]
    return inputs, labels


def mean_losses(model: Any, batch: Batch) -> Tensor:
    """The model's own mean loss of every sample, (B,)."""
    losses = []
    with torch.no_grad():
        for i in range(batch.size):
            inputs, labels = alone(batch, i)
            losses.append(model(**inputs, labels=labels).loss)
    return torch.stack(losses)


def greedy(model: Any, prompt: list[int], stops: set[int], max_new_tokens: int) -> list[int]:
    """The likeliest next token, again and again, from a whole forward each."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + max_new_tokens and not (len(ids) > len(prompt) and ids[-1] in stops):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def laid_one_by_one(texts: list[list[int]], rows: list[list[int]]) -> dict[str, list[list[int]]]:
    """Token ids, positions and numbers of texts that stand end to end in rows; what is left of a row is a text of
    zeros with the number after the last."""
    width = max(sum(len(texts[number]) for number in row) for row in rows)
    found: dict[str, list[list[int]]] = {"input_ids": [], "position_ids": [], "samples": []}
    for row in rows:
        cells = [(token, place, number) for number in row for place, token in enumerate(texts[number])]
        cells += [(0, place, len(texts)) for place in range(width - len(cells))]
        for values, column in zip(found.values(), zip(*cells, strict=True), strict=True):
            values.append(list(column))
    return found
