"""Scores as docs/method.md has them, slow and plain: one sample at a time, autograd, factors updated in place."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class Reference:
    """Per sample, float64: loss (N,), grad_norm (N,), delta_loss (N,), gradients (N, P) in sorted name order."""

    loss: np.ndarray
    grad_norm: np.ndarray
    delta_loss: np.ndarray
    gradients: np.ndarray
    shapes: dict[str, tuple[int, ...]]

    def alignment(self, direction: np.ndarray | None = None) -> np.ndarray:
        """Exact cosines with ``direction``, or with the mean gradient."""
        mean = self.gradients.mean(axis=0) if direction is None else direction
        return self.gradients @ mean / (np.linalg.norm(self.gradients, axis=1) * np.linalg.norm(mean))

    def unit_mean(self) -> np.ndarray:
        """Mean (P,) of the gradients scaled to unit length."""
        return np.mean([gradient / np.linalg.norm(gradient) for gradient in self.gradients], axis=0)

    def of(self, name: str) -> np.ndarray:
        """The gradients (N, ...) of one parameter."""
        start = 0
        for other, shape in self.shapes.items():
            stop = start + int(np.prod(shape))
            if other == name:
                return self.gradients[:, start:stop].reshape(-1, *shape)
            start = stop
        raise KeyError(name)


def theta(model: nn.Module, include_head: bool) -> dict[str, nn.Parameter]:
    """LoRA factors, and with ``include_head`` the trained head, by sorted name."""
    wanted = (".lora_A.default.", ".lora_B.default.", *([".modules_to_save.default."] if include_head else []))
    return dict(sorted((n, p) for n, p in model.named_parameters() if any(w in n for w in wanted)))


def score_one_by_one(
    model: nn.Module,
    samples: Sequence[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    *,
    eta: float,
    include_head: bool = False,
) -> Reference:
    """Score ``samples``, each alone, on a float64 copy of ``model``."""
    model = copy.deepcopy(model).double().eval()
    parameters = theta(model, include_head)
    losses, norms, deltas, rows = [], [], [], []
    for sample in samples:
        loss = loss_of(model, sample)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), gradients, strict=True)
        ]
        kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter -= eta * gradient
            after = loss_of(model, sample)
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
        row = torch.cat([gradient.flatten() for gradient in gradients]).detach()
        losses.append(loss.item())
        norms.append(row.norm().item())
        deltas.append(loss.item() - after.item())
        rows.append(row.numpy())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return Reference(np.array(losses), np.array(norms), np.array(deltas), np.stack(rows), shapes)


def quality(terms: np.ndarray, weights: Sequence[float], *, gate: bool = False) -> np.ndarray:
    """Eq. 1, sample by sample: weighted z-scores clipped to +-3. ``gate``: of convergence only what is below zero."""
    out = np.zeros(len(terms))
    for column, weight in enumerate(weights):
        values = terms[:, column]
        for i, value in enumerate(values):
            z = min(value, 0.0) / values.std() if gate and column == 2 else (value - values.mean()) / values.std()
            out[i] += weight * min(3.0, max(-3.0, z))
    return out


def inclusion_probabilities(weights: np.ndarray, k: int) -> np.ndarray:
    """Exact probabilities that successive weighted draws without replacement take each item, by enumeration."""

    def walk(taken: tuple[int, ...], probability: float) -> None:
        if len(taken) == k:
            result[list(taken)] += probability
            return
        left = [i for i in range(len(weights)) if i not in taken]
        for i in left:
            walk((*taken, i), probability * weights[i] / weights[left].sum())

    result = np.zeros(len(weights))
    walk((), 1.0)
    return result


def probabilities(quality: Sequence[float], tau: float, strata: Sequence[int] | None = None) -> list[float]:
    """Eq. 2 in Python's floats; with ``strata`` within each, weighed by its share of the samples."""
    groups = [0] * len(quality) if strata is None else [int(group) for group in strata]
    found = []
    for value, group in zip(quality, groups, strict=True):
        peers = [other for other, one in zip(quality, groups, strict=True) if one == group]
        denominator = math.fsum(math.exp((other - value) / tau) for other in peers)
        found.append(len(peers) / len(quality) / denominator)
    return found
