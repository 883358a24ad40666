"""Sums in one order, clipping that does not see the last bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tsqlora_scale.engine.numerics import NORM_BITS, clip_gradients, fix_summation_order, rounded_norm

norms = st.floats(1e-20, 1e20)


class Times(nn.Module):
    """Uses its input once for each factor; the gradients arrive last factor first."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        return sum((x * f for f in self.factors), start=torch.zeros(()))


class Both(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        return sum((part(x) for part in self.parts), start=torch.zeros(()))


def gradient(module: nn.Module) -> float:
    x = torch.ones((), requires_grad=True)
    module(x).backward()
    assert x.grad is not None
    return x.grad.item()


def test_what_a_module_contributes_is_added_up_first() -> None:
    # in float32 1e8 + 1 is 1e8: the sum says in which order it was made
    module = Both(Times(1.0, 1e8), Times(-1e8))
    assert gradient(module) == 1.0  # one after another: (-1e8 + 1e8) + 1
    fix_summation_order(module)
    assert gradient(module) == 0.0  # each module's first: -1e8 + (1e8 + 1)


def test_outputs_and_gradients_stay() -> None:
    torch.manual_seed(0)
    module = Both(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), Times(0.3, -2.0))
    x = torch.randn(3, 4, requires_grad=True)

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        output = module(x)
        return output, torch.autograd.grad(output.square().sum(), [x, *module.parameters()])

    before, expected = run()
    fix_summation_order(module)
    after, gradients = run()
    assert torch.equal(before, after)
    torch.testing.assert_close(gradients, expected)


def test_inputs_without_gradient_are_left_alone() -> None:
    seen = []

    class Watch(nn.Module):
        def forward(self, ids: Tensor, name: str) -> Tensor:
            seen.append((ids, name))
            return ids

    module = Watch()
    fix_summation_order(module)
    ids = torch.tensor([1, 2])
    assert module(ids, "a") is ids
    assert seen == [(ids, "a")]


@given(norms)
def test_rounding_is_small_and_final(value: float) -> None:
    norm = torch.tensor(value)
    rounded = rounded_norm(norm)
    assert rounded.item() == pytest.approx(norm.item(), rel=2.0**-NORM_BITS)
    assert torch.equal(rounded_norm(rounded), rounded)


@given(norms, st.integers(-3, 3))
def test_last_bits_are_dropped(value: float, ulps: int) -> None:
    norm = torch.tensor(value)
    other = norm
    for _ in range(abs(ulps)):
        other = torch.nextafter(other, torch.tensor(math.copysign(math.inf, ulps)))
    step = 2.0**-NORM_BITS
    mantissa, _ = math.frexp(norm.item())
    if abs(mantissa / step % 1 - 0.5) > 1e-3:  # not beside a rounding boundary
        assert torch.equal(rounded_norm(other), rounded_norm(norm))


@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0])
def test_no_number_to_round(value: float) -> None:
    assert rounded_norm(torch.tensor(value, dtype=torch.float64)).item() == pytest.approx(value, nan_ok=True)


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_clipping_is_torchs_but_for_the_rounding(size: float, max_norm: float) -> None:
    ours, theirs, without = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    gradient = torch.tensor([2.0, -1.0, 2.0]) * size / 3
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    clip_gradients([ours, without], gradient.norm(), max_norm)
    nn.utils.clip_grad_norm_([theirs], max_norm)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=2.0**-NORM_BITS, atol=1e-7)
    if size < 0.99 * max_norm:
        assert torch.equal(ours.grad, gradient)
    assert without.grad is None
