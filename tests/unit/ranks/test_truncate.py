"""Cuts to lower ranks are the best approximations there are."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reference.ranks import best_approximation
from tsqlora_scale.ranks.truncate import CutBy, LayerFactors, cut_ranks, singular_values, truncate


def layers(seed: int, ranks: list[int]) -> dict[str, LayerFactors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layer{number}": LayerFactors(
            torch.randn(rank, 7, generator=generator), torch.randn(9, rank, generator=generator), 0.5 + number
        )
        for number, rank in enumerate(ranks)
    }


def update(layer: LayerFactors) -> torch.Tensor:
    return layer.scaling * layer.b.double() @ layer.a.double()


@given(seed=st.integers(0, 99), ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4), rank=st.integers(1, 6),
       by=st.sampled_from(["uniform", "total"]))  # fmt: skip
def test_every_layer_is_the_best_of_its_rank(seed: int, ranks: list[int], rank: int, by: CutBy) -> None:
    before = layers(seed, ranks)
    found = truncate(before, rank, by=by)
    lost = whole = 0.0
    for name, layer in before.items():
        new = found.layers[name]
        assert new.scaling == layer.scaling
        expected = best_approximation(update(layer), len(new.a))
        torch.testing.assert_close(update(new), expected, atol=1e-4, rtol=0)
        lost += float((update(layer) - expected).square().sum())
        whole += float(update(layer).square().sum())
    assert found.error == pytest.approx(math.sqrt(lost / whole), abs=1e-5)


@given(seed=st.integers(0, 99), ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3), rank=st.integers(1, 4))
def test_a_total_is_shared_out_as_well_as_can_be(seed: int, ranks: list[int], rank: int) -> None:
    """Against every way to share it out."""
    spectra = {name: singular_values(layer) for name, layer in layers(seed, ranks).items()}
    found = cut_ranks(spectra, rank, by="total")
    most = min(rank * len(ranks), sum(ranks))
    ways = itertools.product(*(range(1, own + 1) for own in ranks))

    def kept(way: tuple[int, ...]) -> float:
        return sum(float(np.square(s[:k]).sum()) for s, k in zip(spectra.values(), way, strict=True))

    best = max(kept(way) for way in ways if sum(way) <= most)
    assert sum(found.values()) == most
    assert kept(tuple(found.values())) == pytest.approx(best)


def test_a_uniform_cut_lets_lower_layers_be() -> None:
    before = layers(0, [2, 6])
    found = truncate(before, 3, by="uniform")
    assert [len(layer.a) for layer in found.layers.values()] == [2, 3]
    torch.testing.assert_close(update(found.layers["layer0"]), update(before["layer0"]))
    assert truncate(before, 6, by="uniform").error == pytest.approx(0, abs=1e-12)


def test_a_layer_that_was_never_trained_keeps_one_component() -> None:
    before = {"zero": LayerFactors(torch.ones(4, 7), torch.zeros(9, 4), 1.0)}
    assert cut_ranks({"zero": np.zeros(4)}, 3, by="uniform") == {"zero": 1}
    assert truncate(before, 3, by="total").error == 0
