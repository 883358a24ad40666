"""Minibatches as a pure function of the step."""

from __future__ import annotations

import gc
import mmap
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from tests.reference.quality import inclusion_probabilities
from tsqlora_scale.common import disk_arrays
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.quality.draws.batch_sampler import BatchSampler
from tsqlora_scale.quality.draws.dyadic import DyadicClasses

INDICES = np.array([3, 4, 8, 10, 11, 20])
WEIGHTS = np.array([0.1, 0.0, 0.25, 0.05, 0.4, 0.2])


def make(weights=WEIGHTS, **options) -> BatchSampler:
    return BatchSampler(INDICES, weights, **{"batch_size": 4, "seed": 0, "replacement": True} | options)


@pytest.mark.parametrize("weights", [None, WEIGHTS, 7 * WEIGHTS])
def test_draws_follow_the_weights(weights):
    sampler = make(weights, batch_size=50)
    drawn = np.concatenate([sampler.draw(step) for step in range(200)])
    expected = np.full(6, 1 / 6) if weights is None else WEIGHTS
    counts = np.array([(drawn == index).sum() for index in INDICES])
    assert counts.sum() == 10000
    assert counts[expected == 0].sum() == 0
    assert chisquare(counts[expected > 0], 10000 * expected[expected > 0]).pvalue > 1e-3


def test_neighbouring_steps_and_seeds_are_independent():
    pairs = np.zeros((6, 6))
    for step in range(0, 4000, 2):
        first, second = (make(None, batch_size=1).draw(s)[0] for s in (step, step + 1))
        pairs[np.searchsorted(INDICES, first), np.searchsorted(INDICES, second)] += 1
    assert chisquare(pairs.ravel()).pvalue > 1e-3
    assert any((make(seed=0).draw(s) != make(seed=1).draw(s)).any() for s in range(3))


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_draw_depends_on_nothing_but_the_step(replacement, weights):
    forwards = make(weights, replacement=replacement)
    in_order = [forwards.draw(step).tolist() for step in range(12)]
    for step in (7, 0, 11, 3):
        assert make(weights, replacement=replacement).draw(step).tolist() == in_order[step]
        assert forwards.draw(step).tolist() == in_order[step]


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 50), st.booleans(), st.integers(0, 2**31 - 1))
def test_without_replacement_every_epoch_covers_the_subset_once(size, batch_size, weighted, seed):
    indices = np.arange(size) * 3 + 1
    weights = np.linspace(0, 1, size) if weighted and size > 1 else None
    sampler = BatchSampler(indices, weights, batch_size=batch_size, seed=seed, replacement=False)
    steps = -(-3 * size // batch_size)
    drawn = np.concatenate([sampler.draw(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(drawn[epoch * size : (epoch + 1) * size]) == indices.tolist()


def test_without_replacement_heavy_samples_come_early():
    weights = np.array([0.5, 0.05, 0.2, 0.1, 0.1, 0.05])
    trials = 4000
    sampler = BatchSampler(np.arange(6), weights, batch_size=6, seed=0, replacement=False)
    early = np.zeros(6)
    for epoch in range(trials):
        early[sampler.draw(epoch)[:2]] += 1
    exact = inclusion_probabilities(weights, 2)
    np.testing.assert_array_less(np.abs(early / trials - exact), 4.5 * np.sqrt(exact * (1 - exact) / trials))


def test_uniform_epochs_differ():
    sampler = make(None, batch_size=6, replacement=False)
    assert len({tuple(sampler.draw(epoch)) for epoch in range(5)}) > 1


def test_state_is_checked_not_restored():
    state = make().state_dict()
    make().load_state_dict(state)
    with pytest.raises(UserError, match="other weights"):
        make(WEIGHTS[::-1].copy()).load_state_dict(state)
    with pytest.raises(UserError, match="other weights"):
        make(None).load_state_dict(state)
    with pytest.raises(UserError, match=r"batch_size=4.*5"):
        make(batch_size=5).load_state_dict(state)
    with pytest.raises(UserError, match="seed"):
        make(seed=2).load_state_dict(state)


def test_the_draws_of_this_version_do_not_change():
    """A run resumed with another version would otherwise train on other data without a word."""
    assert make().draw(0).tolist() == [8, 11, 20, 3]
    assert make(replacement=False).draw(1).tolist() == [10, 4, 11, 8]


@pytest.mark.parametrize("replacement", [True, False])
def test_a_sampler_that_takes_over_draws_anew(replacement):
    """The same random numbers on nearly the same weights would be the same batches again."""
    weights = np.random.default_rng(0).random(1000)
    draws = []
    for start in (5, 15):
        sampler = BatchSampler(np.arange(1000), weights, batch_size=20, seed=0, replacement=replacement, start=start)
        draws.append(np.stack([sampler.draw(step) for step in range(start, start + 10)]))
    assert (draws[0] == draws[1]).mean() < 0.02
    if not replacement:
        assert len(np.unique(draws[1])) == 200, "an epoch begins with the sampler"
    with pytest.raises(AssertionError):
        sampler.draw(14)


def test_rounding_of_the_weights_changes_no_draw() -> None:
    """Engines agree on scores up to rounding; they must draw the same samples all the same."""
    rng = np.random.default_rng(0)
    weights = np.exp(1.2 * rng.standard_normal(3000))
    rounded = weights * (1 + 1e-6 * rng.standard_normal(3000))
    first, second = (
        BatchSampler(np.arange(3000), w, batch_size=32, seed=0, replacement=True) for w in (weights, rounded)
    )
    different = sum((first.draw(step) != second.draw(step)).sum() for step in range(150))
    assert different <= 1


@pytest.mark.parametrize("weights", [[1.0], [0.0, 3.0], [1e-300, 1.0, 1.0], [0.5, 0.25, 0.25, 1.0, 1e-3, 0.0]])
def test_dyadic_classes_follow_the_weights(weights: list[float]) -> None:
    drawn = DyadicClasses(np.array(weights)).draw(np.random.default_rng(1), 40_000)
    expected = np.array(weights) / np.sum(weights)
    found = np.bincount(drawn, minlength=len(weights)) / len(drawn)
    assert (found[expected == 0] == 0).all()
    assert np.abs(found - expected).max() <= 5 * np.sqrt(0.25 / len(drawn))


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_classes_made_in_blocks_and_on_disk_are_the_same(block, monkeypatch, tmp_path) -> None:
    weights = np.exp(3 * np.random.default_rng(0).standard_normal(500))
    weights[::9] = 0
    expected = DyadicClasses(weights).draw(np.random.default_rng(1), 2000)
    monkeypatch.setattr(disk_arrays, "BLOCK", block)
    np.save(tmp_path / "weights.npy", weights)
    mapped = np.load(tmp_path / "weights.npy", mmap_mode="r")
    for limit in (disk_arrays.IN_MEMORY, 0):
        monkeypatch.setattr(disk_arrays, "IN_MEMORY", limit)
        assert (DyadicClasses(mapped).draw(np.random.default_rng(1), 2000) == expected).all()
    assert isinstance(DyadicClasses(mapped)._members.base, mmap.mmap)


def test_a_draw_is_the_same_alone_and_among_many() -> None:
    """With the same random numbers: one draw's attempts never use another's."""

    class Columns:
        """Gives the first of every row of numbers, whatever count is asked for."""

        def __init__(self, count: int) -> None:
            self.count, self.generator = count, np.random.default_rng(3)

        def random(self, shape):
            whole = self.generator.random(50) if isinstance(shape, int) else self.generator.random((shape[0], 50))
            return whole[..., : self.count]

    classes = DyadicClasses(np.exp(np.random.default_rng(0).standard_normal(100)))
    many = classes.draw(Columns(50), 50)
    for count in (1, 2, 17):
        assert (classes.draw(Columns(count), count) == many[:count]).all()


def test_a_sampler_goes_with_its_last_reference() -> None:
    """Its columns lie on disk where they are large, and must not wait for the collector of cycles."""
    made = make(replacement=False)
    made.draw(0)
    gone = weakref.ref(made)
    gc.disable()
    try:
        del made
        assert gone() is None
    finally:
        gc.enable()
