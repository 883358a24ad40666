import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import ranks as reference
from tests.unit.ranks.layers import SHAPES, factors, product, relative, resize
from tsqlora_scale.common.random_streams import layer_generator
from tsqlora_scale.engine.train_state import ParamState
from tsqlora_scale.ranks.resize import INITIAL_ROW_NORM


@given(SHAPES, st.data())
def test_svd_shrink_is_the_best_approximation(shape: tuple[int, int, int], data: st.DataObject) -> None:
    a, b = factors(*shape, seed=data.draw(st.integers(0, 1000)))
    rank = data.draw(st.integers(1, shape[0] - 1))
    new = resize(a, b, rank)
    want = reference.best_approximation(product(a, b), rank)
    assert new.a.value.shape == (rank, shape[1])
    assert new.b.value.shape == (shape[2], rank)
    assert relative(product(new.a, new.b), want) < 1e-5
    assert new.shrink_error == pytest.approx(relative(want, product(a, b)), abs=1e-5)


def test_svd_shrink_balances_the_factors() -> None:
    new = resize(*factors(6, 12, 20), rank=4)
    assert torch.allclose(new.a.value @ new.a.value.T, new.b.value.T @ new.b.value, atol=1e-6)


@settings(max_examples=30)
@given(SHAPES, st.data())
def test_first_moments_are_those_of_the_transported_gradients(shape: tuple[int, int, int], data: st.DataObject) -> None:
    """Two moving averages over the same gradients of dW: one of the old factors, resized; one of the new factors."""
    r, d_in, d_out = shape
    a, b = factors(r, d_in, d_out, seed=data.draw(st.integers(0, 1000)))
    rank = data.draw(st.integers(1, min(r - 1, d_in, d_out)))  # more would be new components
    target = resize(a, b, rank)
    old = [torch.zeros_like(a.value), torch.zeros_like(b.value)]
    new = [torch.zeros_like(target.a.value), torch.zeros_like(target.b.value)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        grad = torch.randn(d_out, d_in, generator=generator)
        for moments, (fa, fb) in ((old, (a, b)), (new, (target.a, target.b))):
            moments[0].mul_(0.9).add_(0.1 * fb.value.T @ grad)
            moments[1].mul_(0.9).add_(0.1 * grad @ fa.value.T)
    got = resize(ParamState(a.value, old[0], a.exp_avg_sq), ParamState(b.value, old[1], b.exp_avg_sq), rank)
    assert relative(got.a.exp_avg, new[0]) < 1e-3
    assert relative(got.b.exp_avg, new[1]) < 1e-3


def test_second_moments_follow_the_squared_map() -> None:
    """Where no components mix (orthogonal factors), it is exact: v of g * c is v * c^2."""
    a, b = factors(3, 8, 8)
    a.value, b.value = torch.eye(3, 8), torch.eye(8, 3) * torch.tensor([4.0, 9.0, 1.0])
    new = resize(a, b, 2)
    # components 9 and 4 are kept, as A' = sqrt(s) A, B' = B / sqrt(s): the gradient of A' is that of A / sqrt(s)
    scale = torch.tensor([4.0, 9.0])
    assert torch.allclose(new.a.exp_avg_sq, a.exp_avg_sq[:2] / scale[:, None])
    assert torch.allclose(new.b.exp_avg_sq, b.exp_avg_sq[:, :2] * scale)


def test_equal_singular_values_do_not_let_rounding_choose_the_factors() -> None:
    """Singular vectors of equal values turn freely in their plane; the factors must not."""
    basis_in, basis_out = (torch.linalg.qr(torch.randn(16, 4, dtype=torch.float64)).Q.float() for _ in range(2))
    a, b = factors(4, 16, 16)
    a.value, b.value = basis_in.T.contiguous(), basis_out * torch.tensor([1.0, 1.0, 0.1, 1.0])
    nearly = ParamState(a.value + 1e-7 * torch.randn(4, 16), a.exp_avg, a.exp_avg_sq)
    first, second = resize(a, b, 3), resize(nearly, b, 3)
    for one, other in ((first.a, second.a), (first.b, second.b)):
        assert relative(one.value, other.value) < 1e-5
        assert relative(one.exp_avg, other.exp_avg) < 1e-5
        assert relative(one.exp_avg_sq, other.exp_avg_sq) < 1e-5


@given(SHAPES, st.sampled_from(["orthogonal", "gaussian"]), st.integers(1, 30))
def test_growth_leaves_everything_there_is_untouched(shape: tuple[int, int, int], init: str, more: int) -> None:
    r, d_in, _ = shape
    a, b = factors(*shape)
    new = resize(a, b, r + more, grow_init=init)
    assert new.shrink_error == 0.0
    for name in ("value", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(new.a, name)[:r], getattr(a, name))
        assert torch.equal(getattr(new.b, name)[:, :r], getattr(b, name))
    assert not new.b.value[:, r:].any()
    assert not new.a.exp_avg[r:].any()
    assert not new.b.exp_avg[:, r:].any()
    assert torch.allclose(new.a.exp_avg_sq[r:], a.exp_avg_sq.mean(0).expand(more, -1))
    assert torch.allclose(new.b.exp_avg_sq[:, r:], b.exp_avg_sq.mean(1, keepdim=True).expand(-1, more))
    if init == "orthogonal":
        room = max(min(more, d_in - r), 0)
        rows, norm = new.a.value[r : r + room], a.value.norm(dim=1).mean()
        assert (rows @ a.value.T).abs().max().item() < 1e-6 if room else True
        assert torch.allclose(rows @ rows.T, norm**2 * torch.eye(room), atol=1e-6)


def test_gaussian_rows_have_the_norm_of_the_present_ones_on_average() -> None:
    a, b = factors(4, 400, 8)
    new = resize(a, b, 200, grow_init="gaussian")
    assert new.a.value[4:].norm(dim=1).mean().item() == pytest.approx(a.value.norm(dim=1).mean().item(), rel=0.02)
    assert new.a.value[4:].std().item() == pytest.approx(0.1, rel=0.05)


def test_first_updates_of_new_components_stay_below_the_learning_rate() -> None:
    """Adam at its hundredth step, on gradients up to ten times the size of the usual ones."""
    a, b = factors(4, 16, 16)
    usual = torch.full((16, 4), 1e-3)
    new = resize(a, ParamState(b.value, usual, usual.square()), 6).b
    grad = torch.full((16, 6), 1e-2)
    avg = 0.9 * new.exp_avg + 0.1 * grad
    sq = 0.999 * new.exp_avg_sq + 0.001 * grad.square()
    update = (avg / (1 - 0.9**100)) / (sq / (1 - 0.999**100)).sqrt()
    assert update[:, 4:].max().item() <= 1.0


def test_importance_keeps_components_exactly() -> None:
    a, b = factors(5, 8, 10)
    new = resize(a, b, 2, shrink="importance", importance=torch.tensor([0.1, 5.0, 0.2, 0.0, 3.0]))
    for name in ("value", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(new.a, name), getattr(a, name)[[1, 4]])
        assert torch.equal(getattr(new.b, name), getattr(b, name)[:, [1, 4]])
    assert new.shrink_error == pytest.approx(relative(product(new.a, new.b), product(a, b)), abs=1e-6)


def test_importance_is_estimated_from_first_moments() -> None:
    a, b = factors(4, 8, 10)
    a.exp_avg[:], b.exp_avg[:] = 0.0, 0.0
    a.exp_avg[2], b.exp_avg[:, 0] = 1.0, 0.5
    new = resize(a, b, 2, shrink="importance")
    assert torch.equal(new.a.value, a.value[[0, 2]])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-18])
def test_shrinking_an_untrained_layer_gives_an_untrained_layer(scale: float) -> None:
    a, b = factors(6, 10, 12)
    b.value *= scale
    new = resize(a, b, 3)
    assert not new.b.value.any()
    assert torch.allclose(new.a.value @ new.a.value.T, a.value.norm(dim=1).mean() ** 2 * torch.eye(3), atol=1e-6)
    for state in (new.a, new.b):
        assert not state.exp_avg.any()
        assert state.exp_avg_sq.isfinite().all()
        assert (state.exp_avg_sq > 0).all()


def test_missing_directions_are_filled_with_new_ones() -> None:
    """Six components that span two directions: a shrink to four keeps these two and adds two new ones."""
    a, b = factors(6, 10, 12)
    b.value = b.value[:, :2] @ torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    new = resize(a, b, 4)
    assert relative(product(new.a, new.b), product(a, b)) < 1e-5
    assert new.shrink_error < 1e-6
    assert not new.b.value[:, 2:].any()
    assert (new.a.value[:2] @ new.a.value[2:].T).abs().max().item() < 1e-6


def test_growth_from_nothing_uses_the_usual_initial_norm() -> None:
    a, b = factors(2, 10, 12)
    a.value[:] = 0
    assert resize(a, b, 3).a.value[2].norm().item() == pytest.approx(INITIAL_ROW_NORM)


def test_the_same_rank_changes_nothing() -> None:
    a, b = factors(4, 8, 8)
    new = resize(a, b, 4)
    assert new.a is a
    assert new.b is b


@pytest.mark.parametrize("shrink", ["svd", "importance"])
def test_fifty_resizes_in_a_row_stay_finite(shrink: str) -> None:
    a, b = factors(4, 24, 16)
    generator = torch.Generator().manual_seed(0)
    for step in range(50):
        rank = int(torch.randint(1, 20, (), generator=generator))
        before = product(a, b)
        new = resize(a, b, rank, shrink=shrink, generator=layer_generator(0, step, "layer"))
        grew = rank >= a.value.shape[0]
        a, b = new.a, new.b
        if grew:
            assert torch.equal(product(a, b), before) or relative(product(a, b), before) < 1e-6
        for state in (a, b):
            for tensor in (state.value, state.exp_avg, state.exp_avg_sq):
                assert tensor.dtype == torch.float32
                assert tensor.isfinite().all()
            assert (state.exp_avg_sq >= 0).all()
        b.value += 0.01 * torch.randn(b.value.shape, generator=generator)  # as if trained


def test_draws_depend_on_seed_step_and_layer_alone() -> None:
    def draw(*key) -> Tensor:
        return torch.randn(4, generator=layer_generator(*key))

    assert torch.equal(draw(1, 2, "a"), draw(1, 2, "a"))
    others = [draw(2, 2, "a"), draw(1, 3, "a"), draw(1, 2, "b")]
    assert not any(torch.equal(draw(1, 2, "a"), other) for other in others)
    state = torch.get_rng_state()
    resize(*factors(4, 8, 8), 6)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("shrink", ["svd", "importance"])
def test_a_layer_of_rank_0_has_nothing_and_comes_back_as_a_fresh_one(shrink: str) -> None:
    a, b = factors(4, 8, 12)
    gone = resize(a, b, 0, shrink=shrink)
    assert gone.a.value.shape == gone.a.exp_avg_sq.shape == (0, 8)
    assert gone.b.value.shape == gone.b.exp_avg.shape == (12, 0)
    assert gone.shrink_error == 1.0
    assert resize(a, ParamState.fresh(torch.zeros(12, 4)), 0, shrink=shrink).shrink_error == 0.0
    back = resize(gone.a, gone.b, 3, shrink=shrink, usual_sq=(1e-6, 4e-6))
    assert torch.allclose(back.a.value @ back.a.value.T, INITIAL_ROW_NORM**2 * torch.eye(3), atol=1e-6)
    assert not back.b.value.any()
    assert not back.a.exp_avg.any()
    assert not back.b.exp_avg.any()
    assert torch.equal(back.a.exp_avg_sq, torch.full((3, 8), 1e-6))
    assert torch.equal(back.b.exp_avg_sq, torch.full((12, 3), 4e-6))
