"""The sketch keeps inner products: unbiased, with the stated error, on structured gradients too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tsqlora_scale.quality.gradients.sketch import Sketch, cosines

SHAPES = {"layer.0.lora_A": (8, 96), "layer.0.lora_B": (80, 8), "layer.1.lora_A": (8, 96), "head.bias": (5,)}


def gradients(batch: int, seed: int, outliers: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(batch, *shape, generator=generator) for name, shape in SHAPES.items()}
    if outliers:  # a few input channels dominate in every row and layer, as in trained transformers
        for name, gradient in found.items():
            if name.endswith("lora_A"):
                gradient[:, :, [3, 67]] *= 30
    return found


def flat(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([found[name].flatten(1) for name in sorted(found)], 1)


@pytest.mark.parametrize("outliers", [False, True])
def test_inner_products_are_unbiased_over_seeds(outliers):
    found = gradients(2, 0, outliers)
    x, y = flat(found)
    y = y + 0.5 * x
    both = {name: torch.stack([g[0], g[1] + 0.5 * g[0]]) for name, g in found.items()}
    dim, seeds = 64, 2000
    sketches = torch.stack([Sketch(dim, seed=seed)(both) for seed in range(seeds)])
    products = (sketches[:, 0] * sketches[:, 1]).sum(1)
    stated = float(x.norm() * y.norm()) / dim**0.5
    assert abs(float(products.mean() - x @ y)) < 5 * stated * 2**0.5 / seeds**0.5
    # a variance of (|x|^2 |y|^2 + (x.y)^2) / dim is that of hashing every entry independently
    independent = ((x.norm() * y.norm()) ** 2 + (x @ y) ** 2) / dim
    assert float(products.var()) < 1.5 * float(independent)


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("dim", [100, 512])
def test_cosines_are_within_the_stated_error(dim, outliers):
    found = gradients(200, 1, outliers)
    found = {name: g + 0.7 * g[:1] for name, g in found.items()}
    x = flat(found).double()
    exact = cosines(x, x.mean(0)).numpy()
    sketches = Sketch(dim, seed=3)(found)
    error = cosines(sketches, sketches.double().mean(0)).numpy() - exact
    assert exact.std() > 0.01
    assert np.sqrt((error**2).mean()) < 1.5 / dim**0.5
    assert np.abs(error).max() < 5 / dim**0.5


def test_one_channel_of_all_rows_fills_slots_of_its_own():
    gradient = torch.zeros(1, 8, 512)
    gradient[:, :, 40] = 1.0
    assert int((Sketch(128, seed=0)({"a": gradient}) != 0).sum()) == 8


def test_linear_and_deterministic_whatever_the_batch_and_the_order_of_names():
    found = gradients(6, 2)
    first = Sketch(64, seed=5)(found)
    assert first.shape == (6, 64)
    assert first.dtype == torch.float32
    assert torch.equal(first, Sketch(64, seed=5)(dict(reversed(found.items()))))
    halves = [Sketch(64, seed=5)({name: g[part] for name, g in found.items()}) for part in (slice(2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(halves), first, rtol=0, atol=1e-5)
    total = Sketch(64, seed=5)({name: g.sum(0, keepdim=True) for name, g in found.items()})
    torch.testing.assert_close(total, first.sum(0, keepdim=True), rtol=0, atol=1e-4)
    assert not torch.equal(first, Sketch(64, seed=6)(found))


def test_does_not_depend_on_memory_layout_and_absent_factors_are_zero():
    found = gradients(3, 4)
    moved = {name: g.transpose(1, 2).contiguous().transpose(1, 2) if g.dim() == 3 else g for name, g in found.items()}
    sketch = Sketch(64, seed=0)
    assert torch.equal(sketch(found), sketch(moved))
    present = {"layer.0.lora_A": found["layer.0.lora_A"]}
    absent = present | {"layer.1.lora_A": torch.zeros(3, 8, 96)}
    assert torch.equal(sketch(present), sketch(absent))


def test_a_grown_factor_keeps_the_signs_of_its_rows():
    sketch = Sketch(64, seed=0)
    small = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
    grown = torch.cat([small, torch.zeros(2, 4, 40)], 1)
    torch.testing.assert_close(sketch({"a": small}), sketch({"a": grown}))


def test_ranks_that_come_and_go_leave_one_layout_a_factor():
    sketch = Sketch(32, seed=1)
    for rank, most in ((3, 3), (8, 8), (5, 8), (3, 8)):
        gradient = torch.randn(2, rank, 40)
        torch.testing.assert_close(sketch({"a": gradient}), Sketch(32, seed=1)({"a": gradient}), rtol=0, atol=0)
        assert [len(layout.signs) for layout in sketch._layouts.values()] == [most]


def test_cosine_of_nothing_is_zero_and_nan_stays():
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [float("nan"), 1.0]])
    assert cosines(rows, torch.tensor([2.0, 0.0]))[:2].tolist() == [0.0, 1.0]
    assert cosines(rows, torch.tensor([2.0, 0.0]))[2].isnan()
    assert cosines(rows[:2], torch.zeros(2)).tolist() == [0.0, 0.0]
