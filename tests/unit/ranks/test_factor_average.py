"""The average of adapters is that of their products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reference.averages import mean_product
from tsqlora_scale.ranks.factor_average import average_factors, average_triplets, average_values

D_IN, D_OUT = 7, 5


def pair(rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, D_IN, generator=generator), torch.randn(D_OUT, rank, generator=generator)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 100))
def test_nearest_to_the_mean_of_the_products(ranks: list[int], rank: int, seed: int) -> None:
    pairs = [pair(one, seed + number) for number, one in enumerate(ranks)]
    a, b = average_factors(pairs, rank, generator=generator())
    assert a.shape == (rank, D_IN) and b.shape == (D_OUT, rank)
    wanted = mean_product([(a.numpy(), b.numpy()) for a, b in pairs], rank)
    np.testing.assert_allclose((b.double() @ a.double()).numpy(), wanted, atol=1e-5)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(1, 5), st.integers(0, 100))
def test_triplets_average_to_triplets(ranks: list[int], rank: int, seed: int) -> None:
    """Those of the nearest matrix, orthonormal, E falling; where E is zero A and B still point somewhere."""
    pairs = [pair(one, seed + number) for number, one in enumerate(ranks)]
    triplets = [(a, b, torch.linspace(-1, 2, len(a))) for a, b in pairs]
    a, b, e = average_triplets(triplets, rank, generator=generator())
    assert a.shape == (rank, D_IN) and b.shape == (D_OUT, rank) and e.shape == (rank,)
    wanted = mean_product([((e[:, None] * a).numpy(), b.numpy()) for a, b, e in triplets], rank)
    np.testing.assert_allclose(((b * e).double() @ a.double()).numpy(), wanted, atol=1e-5)
    assert bool((e[:-1] >= e[1:]).all())
    for factor in (a, b.T):
        torch.testing.assert_close(factor @ factor.T, torch.eye(rank), atol=1e-5, rtol=0)
    dead = np.linalg.matrix_rank(wanted, tol=1e-5)
    assert bool((e[dead:] == 0).all())


def test_more_triplets_than_there_are_directions() -> None:
    a, b, e = average_triplets([(*pair(2, 0), torch.ones(2))], 8, generator=generator())
    assert a.shape == (8, D_IN) and b.shape == (D_OUT, 8) and int((e > 0).sum()) == 2
    assert bool(a.isfinite().all()) and bool(b.isfinite().all())


def test_one_snapshot_is_itself() -> None:
    a, b = pair(3, 0)
    found = average_factors([(a, b)], 3, generator=generator())
    assert torch.equal(found[0], a) and torch.equal(found[1], b)


def test_factors_averaged_by_themselves_would_be_another_adapter() -> None:
    """The same function in two bases: the mean of the products is that function, the product of the means is not."""
    (a, b), flip = pair(2, 0), torch.tensor([-1.0, -1.0])
    pairs = [(a, b), (flip[:, None] * a, b * flip)]
    found = average_factors(pairs, 2, generator=generator())
    torch.testing.assert_close(found[1] @ found[0], b @ a)


def test_untrained_factors_average_to_nothing() -> None:
    a, b = pair(3, 0)
    found = average_factors([(a, 0 * b), (a, 0 * b)], 3, generator=generator())
    assert found[1].abs().sum() == 0 and found[0].shape == (3, D_IN)


def test_layers_that_came_and_went_and_what_is_no_factor() -> None:
    """A layer of rank 0 in a snapshot counts as zero there; one of rank 0 now has no factors; the head's is a mean."""
    (a, b), (c, d) = pair(2, 0), pair(1, 1)
    first = {"x.lora_A.default.weight": a, "x.lora_B.default.weight": b, "head": torch.tensor([1.0, 2.0])}
    second = {"y.lora_A.default.weight": c, "y.lora_B.default.weight": d, "head": torch.tensor([3.0, 2.0])}
    average = average_values(
        [first, second],
        ranks={"x": 2, "y": 0},
        dims={"x": (D_IN, D_OUT), "y": (D_IN, D_OUT)},
        generator=lambda _: generator(),
    )
    assert average.keys() == first.keys()
    assert average["head"].tolist() == [2.0, 2.0]
    product = average["x.lora_B.default.weight"] @ average["x.lora_A.default.weight"]
    torch.testing.assert_close(product, b @ a / 2)


def test_layers_of_triplets_that_came_and_went() -> None:
    (a, b), e = pair(2, 0), torch.tensor([0.5, -2.0])
    names = ("x.lora_A.default.weight", "x.lora_B.default.weight", "x.lora_E.default.weight")
    average = average_values(
        [dict(zip(names, (a, b, e), strict=True)) | {"head": torch.ones(1)}, {"head": torch.ones(1)}],
        ranks={"x": 2, "y": 0},
        dims={"x": (D_IN, D_OUT), "y": (D_IN, D_OUT)},
        generator=lambda _: generator(),
    )
    assert average.keys() == {*names, "head"}
    a_now, b_now, e_now = (average[name] for name in names)
    back = average_values(  # a layer that has come back since the last snapshot is a layer of triplets, too
        [dict(zip(names, (a, b, e), strict=True))],
        ranks={"x": 2, "y": 1},
        dims={"x": (D_IN, D_OUT), "y": (D_IN, D_OUT)},
        generator=lambda _: generator(),
    )
    assert {name.replace("x.", "y.") for name in names} <= back.keys()
    assert back["y.lora_E.default.weight"].tolist() == [0.0]
    torch.testing.assert_close((b_now * e_now) @ a_now, (b * e) @ a / 2)


def test_half_as_many_ranks_keep_the_larger_half() -> None:
    a, b = torch.eye(2, D_IN), torch.eye(D_OUT, 2) * torch.tensor([3.0, 1.0])
    found = average_factors([(a, b), (a, b)], 1, generator=generator())
    assert float((found[1] @ found[0])[0, 0]) == pytest.approx(3.0)
    assert float((found[1] @ found[0])[1, 1]) == pytest.approx(0.0, abs=1e-6)
