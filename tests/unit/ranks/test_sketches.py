"""Sketches of weight gradients against autograd's own gradients, and the directions that grow from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import ranks as reference
from tests.unit.ranks.layers import factors, resize
from tests.unit.ranks.models import Batch, adapted, padded_batch
from tests.unit.ranks.trackers import make_tracker, measure, on_two_ranks, split, train_step
from tsqlora_scale.common.random_streams import generator_for
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.ranks.gradient_sketches import SKETCH_ROWS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def sketched(model, batches: list[Batch], estimator: str = "weight", **kwargs) -> dict[str, Tensor]:
    tracker = make_tracker(estimator, micro=len(batches[0]), sketch_seed=3, **kwargs)
    tracker.attach(model)
    train_step(tracker, model, batches)
    tracker.detach()
    tracker.reduce(World())
    return tracker.sketches()


def wanted(model, batch: Batch) -> dict[str, Tensor]:
    """Omega G from autograd's G."""
    found = {}
    for name, gradient in reference.weight_gradients(model, batch.loss).items():
        omega = torch.randn(SKETCH_ROWS, gradient.shape[0], generator=generator_for(3, "gradient sketch", name))
        found[name] = omega @ gradient
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], rel: float = 1e-4) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert value.norm() > 0
        assert float((got[name] - value).norm() / value.norm()) < rel, name


@pytest.mark.parametrize("kind", ["bert", "deberta", "bart", "t5", "llama", "gpt2"])
@pytest.mark.parametrize("estimator", ["weight", "weight_per_sample", "fisher"])
def test_equals_autograd_and_changes_no_sensitivity(kind: str, estimator: str, folder: Path) -> None:
    model, batch = adapted(kind, folder), padded_batch(kind)
    assert_same(sketched(model, [batch], estimator), wanted(model, batch))
    assert measure(model, [batch], estimator, sketch_seed=3) == measure(model, [batch], estimator)


@pytest.mark.distributed
def test_accumulation_checkpointing_and_ranks_change_nothing(folder: Path) -> None:
    model, batches = adapted("deberta", folder), [padded_batch("deberta", seed=seed) for seed in range(2)]
    tracker = make_tracker(beta=0.85, sketch_seed=3)
    tracker.attach(model)
    for step, batch in enumerate(batches):
        train_step(tracker, model, [batch], step=step)
    tracker.detach()
    tracker.reduce(World())
    whole = tracker.sketches()
    mean = {n: 0.85 * 0.15 * one + 0.15 * wanted(model, batches[1])[n] for n, one in wanted(model, batches[0]).items()}
    assert_same(whole, mean)
    for heard in on_two_ranks(model, batches, "weight", beta=0.85, sketch_seed=3):
        assert_same(heard.sketches, whole, rel=1e-5)
    assert_same(sketched(model, split(batches[0], 4)), wanted(model, batches[0]))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(sketched(model, split(batches[0], 2)), wanted(model, batches[0]))


def test_state_keeps_them_and_none_are_taken_unasked(folder: Path) -> None:
    model, batch = adapted("bert", folder), padded_batch("bert")
    tracker = make_tracker(sketch_seed=3)
    tracker.attach(model)
    train_step(tracker, model, [batch])
    tracker.synchronize(World())
    other = make_tracker(sketch_seed=3)
    other.load_state_dict(tracker.state_dict())
    tracker.detach()
    assert all(torch.equal(value, other.sketches()[name]) for name, value in tracker.sketches().items())
    plain = make_tracker()
    plain.attach(model)
    train_step(plain, model, [batch])
    plain.reduce(World())
    assert plain.sketches() == {}
    assert json.loads(json.dumps(plain.state_dict()))["sketches"] == {}


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_new_rows_take_nearly_as_much_of_the_gradient_as_any_could(kind: str, folder: Path) -> None:
    """Of what the present rows leave of it, against the SVD of autograd's gradient and against random directions."""
    model, batch = adapted(kind, folder), padded_batch(kind)
    sketches = sketched(model, [batch])
    shares, random_shares = [], []
    for name, gradient in reference.weight_gradients(model, batch.loss).items():
        d_out, d_in = gradient.shape
        a, b = factors(3, d_in, d_out)
        best = float(torch.linalg.svdvals(reference.outside(gradient, a.value))[:4].square().sum())
        for init, found in (("gradient", shares), ("orthogonal", random_shares)):
            rows = resize(a, b, 7, grow_init=init, sketch=sketches[name]).a.value[3:].double()
            assert (rows @ a.value.double().T).abs().max() < 1e-6
            unit = rows / rows.norm(dim=1, keepdim=True)
            assert torch.allclose(unit @ unit.T, torch.eye(4).double(), atol=1e-5)
            found.append(float((gradient.double() @ unit.T).square().sum()) / best)
    assert min(shares) > 0.9
    assert max(random_shares) < 0.7


@given(st.integers(0, 6), st.integers(1, 12), st.integers(1, 8), st.integers(0, 100))
def test_a_gradient_of_low_rank_is_covered_exactly(r: int, more: int, rank: int, seed: int) -> None:
    """New rows and present ones span its row space once there are enough of them; the function is unchanged."""
    d_in, d_out = 20, 12
    generator = torch.Generator().manual_seed(seed)
    right = torch.randn(rank, d_in, generator=generator)
    sketch = (
        torch.randn(SKETCH_ROWS, d_out, generator=generator) @ torch.randn(d_out, rank, generator=generator) @ right
    )
    a, b = factors(r, d_in, d_out, seed + 1000)
    new = resize(a, b, r + more, grow_init="gradient", sketch=sketch, usual_sq=(1e-6, 1e-6))
    assert torch.equal(new.a.value[:r], a.value)
    assert not new.b.value[:, r:].any()
    left = reference.outside(right, new.a.value)
    assert (float(left.norm() / right.norm()) < 1e-3) == (more >= rank)
    unit = new.a.value[r:] / new.a.value[r:].norm(dim=1, keepdim=True)
    assert torch.allclose(unit @ unit.T, torch.eye(more), atol=1e-4)


@pytest.mark.parametrize("sketch", [None, torch.zeros(SKETCH_ROWS, 10)])
def test_without_a_gradient_rows_are_the_orthogonal_ones(sketch: Tensor | None) -> None:
    a, b = factors(3, 10, 8)
    got, want = resize(a, b, 6, grow_init="gradient", sketch=sketch), resize(a, b, 6)
    assert torch.equal(got.a.value, want.a.value)


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_halves_have_one_scale_however_many_steps_each_has_heard(steps: int, folder: Path) -> None:
    """Of steps that are all alike each half is the step's own sketch; a resumed tracker knows how many there were."""
    model, batch = adapted("bert", folder), padded_batch("bert")
    tracker = make_tracker(beta=0.85, sketch_seed=3, halves=True)
    tracker.attach(model)
    for step in range(steps):
        train_step(tracker, model, [batch], step=step)
    tracker.detach()
    tracker.reduce(World())
    one, other = ({name: pair[half] for name, pair in tracker.halves().items()} for half in (0, 1))
    assert_same(one, wanted(model, batch))
    assert_same(other, wanted(model, batch))
    resumed = make_tracker(beta=0.85, sketch_seed=3, halves=True)
    resumed.load_state_dict(tracker.state_dict())
    assert all(torch.equal(value, resumed.halves()[name][0]) for name, value in one.items())
