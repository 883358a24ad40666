"""The average of adapters whose ranks may differ: of the products B A, not of the factors.

The mean of products is a product itself: the A of all snapshots stacked, and their B side by side, divided by their
number. That has the sum of their ranks, and is brought to the layer's rank by what shrinks a layer at a rank event: two
thin QRs and a small SVD, the best approximation there is, without forming the product. Of triplets B diag(E) A the same
SVD is the result: what it is made of are triplets whose factors are orthogonal, as theirs are to be. Everything that is
no factor (a head, DoRA's magnitudes) is averaged plainly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.linalg import qr, svd

from tsqlora_scale.engine.train_state import ParamState
from tsqlora_scale.ranks.install import diagonal_name, factor_names
from tsqlora_scale.ranks.resize import ABSOLUTE_CUTOFF, RELATIVE_CUTOFF, directions, resize_layer

Values = Mapping[str, Tensor]


def average_factors(
    pairs: Sequence[tuple[Tensor, Tensor]], rank: int, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Factors of ``rank`` whose product is nearest to the mean of the products.

    Args:
        pairs: one or more of A, (r, d_in), and B, (d_out, r); ranks may differ, and be 0.
        rank: of the result.
        generator: of rows of A where the mean has less than ``rank``; their part of B is zero.

    Returns:
        A (rank, d_in) and B (d_out, rank), float32.
    """
    a = torch.cat([a for a, _ in pairs])
    b = torch.cat([b / len(pairs) for _, b in pairs], dim=1)
    resized = resize_layer(
        ParamState.fresh(a), ParamState.fresh(b), rank, shrink="svd", grow_init="orthogonal", generator=generator
    )
    return resized.a.value, resized.b.value


def average_triplets(
    triplets: Sequence[tuple[Tensor, Tensor, Tensor]], rank: int, *, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of A, (r, d_in), B, (d_out, r), and E, (r,), whose product is B diag(E) A.

    Returns:
        A (rank, d_in) with orthonormal rows, B (d_out, rank) with orthonormal columns, as far as there is room, and E,
        the singular values, falling; float32. Where the mean has less than ``rank``, E is zero.
    """
    a = torch.cat([a for a, _, _ in triplets]).double()
    b = torch.cat([b * e for _, b, e in triplets], dim=1).double() / len(triplets)
    q_a, r_a = qr(a.T)
    q_b, r_b = qr(b)
    u, values, vh = svd(r_b @ r_a.T, full_matrices=False)
    floor = max(RELATIVE_CUTOFF * float(values[:1].sum()), ABSOLUTE_CUTOFF)
    own = min(rank, int((values > floor).sum()))
    sides = []
    for found in (vh[:own] @ q_a.T, (q_b @ u[:, :own]).T):  # (own, d) each
        more = directions(found, rank - own, "orthogonal", generator, found[:0])
        sides.append(torch.cat([found, more]).float())
    e = torch.cat([values[:own], values.new_zeros(rank - own)]).float()
    return sides[0], sides[1].T.contiguous(), e


def average_values(
    snapshots: Sequence[Values],
    *,
    ranks: Mapping[str, int],
    dims: Mapping[str, tuple[int, int]],
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The average of trained parameters by name, in the shapes of a model of the given ranks.

    Args:
        snapshots: values by parameter name, full and float32, one or more; factors of layers of rank 0 are not there.
        ranks: of every adapted layer, those of the result.
        dims: (d_in, d_out) of every adapted layer.
        generator: of a layer, for :func:`average_factors`.
    """
    average: dict[str, Tensor] = {}
    of_layers = {name for layer in ranks for name in (*factor_names(layer), diagonal_name(layer))}
    # of all layers: one that came back has none in any snapshot
    are_triplets = any(diagonal_name(layer) in one for layer in ranks for one in snapshots)
    for layer, rank in ranks.items():
        if not rank:
            continue
        (name_a, name_b), name_e = factor_names(layer), diagonal_name(layer)
        d_in, d_out = dims[layer]
        nothing = torch.zeros(0, d_in), torch.zeros(d_out, 0), torch.zeros(0)
        pairs = [(one.get(name_a, nothing[0]), one.get(name_b, nothing[1])) for one in snapshots]
        if are_triplets:
            triplets = [(*pair, one.get(name_e, nothing[2])) for pair, one in zip(pairs, snapshots, strict=True)]
            found = average_triplets(triplets, rank, generator=generator(layer))
            average[name_a], average[name_b], average[name_e] = found
        else:
            average[name_a], average[name_b] = average_factors(pairs, rank, generator=generator(layer))
    for name in snapshots[-1]:
        if name not in of_layers:
            average[name] = torch.stack([one[name] for one in snapshots]).double().mean(0).float()
    return average
