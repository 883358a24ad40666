"""Trained layers cut to lower ranks afterwards: the best approximation of every B A, without training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.linalg import qr, svdvals

from tsqlora_scale.engine.train_state import ParamState
from tsqlora_scale.ranks.resize import RELATIVE_CUTOFF, resize_layer

#: ``uniform``: no layer above the rank; ``total``: the rank times the number of layers, shared out by singular values.
CutBy = Literal["uniform", "total"]


@dataclass(frozen=True)
class LayerFactors:
    """A trained layer: A, (r, d_in), B, (d_out, r), and what the forward multiplies B A by."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class Truncation:
    """Layers of lower rank.

    Attributes:
        layers: by name.
        error: ``||dW - dW'||_F / ||dW||_F`` over all layers together, each with its scaling.
    """

    layers: dict[str, LayerFactors]
    error: float


def singular_values(layer: LayerFactors) -> np.ndarray:
    """Of the scaled update s B A, (r,) float64, the largest first, by QR of both factors."""
    product = qr(layer.b.double()).R @ qr(layer.a.double().T).R.T
    values: np.ndarray = svdvals(product).numpy() * layer.scaling
    return values


def cut_ranks(spectra: Mapping[str, np.ndarray], rank: int, *, by: CutBy) -> dict[str, int]:
    """The ranks that keep most of the updates' norm, at least 1 in every layer. A pure function.

    Args:
        spectra: of every layer the singular values of its scaled update, (r,), the largest first.
        rank: of every layer at most, or on average (``total``).
        by: see :data:`CutBy`. ``total`` is the best approximation of all updates together with as many components.
    """
    alive = {n: max(1, int((s > RELATIVE_CUTOFF * s[0]).sum())) if len(s) else 0 for n, s in spectra.items()}
    if by == "uniform":
        return {name: min(rank, count) for name, count in alive.items()}
    ranks = {name: min(1, count) for name, count in alive.items()}
    rest = [
        (-float(spectra[name][k]), place, name) for place, name in enumerate(spectra) for k in range(1, alive[name])
    ]
    for _, _, name in sorted(rest)[: max(0, rank * len(spectra) - sum(ranks.values()))]:
        ranks[name] += 1
    return ranks


def truncate(layers: Mapping[str, LayerFactors], rank: int, *, by: CutBy) -> Truncation:
    """Cut all layers: the best approximation of each B A of its new rank (Eckart-Young), by :func:`.resize_layer`.

    Args:
        layers: of rank 1 or more.
        rank: see :func:`cut_ranks`.
    """
    spectra = {name: singular_values(layer) for name, layer in layers.items()}
    ranks = cut_ranks(spectra, rank, by=by)
    unused = torch.Generator()  # nothing grows
    found = {}
    for name, layer in layers.items():
        a, b = ParamState.fresh(layer.a.float()), ParamState.fresh(layer.b.float())
        new = resize_layer(a, b, ranks[name], shrink="svd", grow_init="orthogonal", generator=unused)
        found[name] = LayerFactors(new.a.value, new.b.value, layer.scaling)
    lost = sum(float(np.square(values[ranks[name] :]).sum()) for name, values in spectra.items())
    whole = sum(float(np.square(values).sum()) for values in spectra.values())
    return Truncation(found, math.sqrt(lost / whole) if whole else 0.0)
