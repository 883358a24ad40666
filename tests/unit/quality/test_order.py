"""Selection and order of keys without a sort of all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.reference import pools
from tsqlora_scale.common import disk_arrays
from tsqlora_scale.quality.draws import key_order
from tsqlora_scale.quality.draws.key_order import Order, descending, largest, smallest

#: few distinct values, so that there are ties, and the ends of the range
KEYS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 5e-324, -5e-324, 1.7e308, -1.7e308, -np.inf, np.inf]),
    st.floats(-50, 50),
)


def keys_of(size: int) -> st.SearchStrategy:
    return arrays(np.float64, size, elements=KEYS)


@given(st.integers(1, 40).flatmap(keys_of))
def test_numbers_sort_as_the_keys_do_downwards(keys):
    numbers = descending(keys)
    assert (np.argsort(numbers, kind="stable") == np.argsort(-keys, kind="stable")).all()
    assert ((numbers[:, None] == numbers) == (keys[:, None] == keys)).all()


@settings(max_examples=200)
@given(
    st.integers(1, 60).flatmap(lambda n: st.tuples(keys_of(n), arrays(np.int32, n, elements=st.integers(0, 4)))),
    st.sampled_from([1, 7, 1000]),
    st.sampled_from([6, 10]),
    st.data(),
)
def test_the_largest_are_those_of_a_sort(pool, block, counters, data):
    keys, strata = pool
    quota = np.array([data.draw(st.integers(0, size)) for size in np.bincount(strata, minlength=5).tolist()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_arrays, "BLOCK", block)
        patch.setattr(disk_arrays, "IN_MEMORY", 0)
        patch.setattr(key_order, "COUNTERS", counters)
        found = largest(keys, quota, strata)
        assert found.dtype == bool
        assert (found == pools.largest(keys, quota, strata)).all()
        assert (quota == np.bincount(strata[found], minlength=5)).all()
        count = int(quota.sum())
        chosen = np.sort(np.argsort(keys, kind="stable")[:count])
        assert np.flatnonzero(smallest(keys.copy(), count)).tolist() == chosen.tolist()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=40), st.data())
def test_equal_keys_are_drawn_among(pool, data):
    keys, strata = np.array([float(key) for key, _ in pool]), np.array([stratum for _, stratum in pool])
    quota = np.array([data.draw(st.integers(0, int((strata == s).sum()))) for s in range(3)])
    found = largest(keys, quota, strata, ties=np.random.default_rng(0))
    assert np.bincount(strata[found], minlength=3).tolist() == quota.tolist()
    for s in range(3):
        inside, outside = keys[found & (strata == s)], keys[~found & (strata == s)]
        assert not len(inside) or not len(outside) or inside.min() >= outside.max()


def test_equal_keys_have_equal_chances():
    keys = np.array([2.0, *[1.0] * 10, 0.0])
    found = np.mean([largest(keys, np.array([6]), ties=np.random.default_rng(seed)) for seed in range(400)], axis=0)
    assert (found[0], found[-1]) == (1, 0)
    assert np.abs(found[1:-1] - 0.5).max() < 0.12
    either = {tuple(largest(np.ones(2), np.array([1]), ties=np.random.default_rng(seed))) for seed in range(20)}
    assert either == {(True, False), (False, True)}


@settings(max_examples=100)
@given(
    st.integers(1, 60).flatmap(keys_of), st.sampled_from([1, 7, 1000]), st.sampled_from([1, 5, 1000]),
    st.sampled_from([3, 12]), st.data(),
)  # fmt: skip
def test_parts_of_the_order_are_those_of_a_sort(keys, block, window, bits, data):
    whole, size = np.argsort(-keys, kind="stable"), len(keys)
    passes = []

    def blocks_of_keys():
        passes.append(1)
        return (keys[one] for one in disk_arrays.blocks(size, block))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_order, "WINDOW", window)
        patch.setattr(key_order, "BITS", bits)
        made = Order(size, blocks_of_keys)
        for _ in range(5):
            start = data.draw(st.integers(0, size - 1))
            stop = data.draw(st.integers(start + 1, size))
            part = made.part(start, stop)
            assert 1 <= len(part) <= stop - start
            assert part.tolist() == whole[start : start + len(part)].tolist()
        place, found = 0, []
        while place < size:
            found.append(made.part(place, size))
            place += len(found[-1])
        assert np.concatenate(found).tolist() == whole.tolist()
    if window >= size:
        assert len(passes) == 1


@pytest.mark.parametrize(
    "ends", [(0.0, 5e-324), (-1.7e308, 1.7e308), (1.0, 1.0), (-np.inf, -np.inf), (-np.inf, np.inf)]
)
def test_a_first_block_that_says_little_of_the_keys(ends, monkeypatch):
    monkeypatch.setattr(key_order, "WINDOW", 3)
    keys = np.array([*ends, -3.0, 4.5, -np.inf, 0.0, 1e300, -1e300, 4.5, np.inf, 5e-324, -np.inf, *ends, -np.inf])
    made = Order(len(keys), lambda: (keys[one] for one in disk_arrays.blocks(len(keys), 2)))
    found = [made.part(place, place + 1)[0] for place in range(len(keys))]
    assert found == np.argsort(-keys, kind="stable").tolist()


def test_a_window_is_as_long_as_it_may_be(monkeypatch):
    """A pass for every sample would be exact, too."""
    monkeypatch.setattr(key_order, "WINDOW", 100)
    keys = np.random.default_rng(0).gumbel(size=2000)
    passes = []
    made = Order(2000, lambda: passes.append(1) or [keys])
    for place in range(2000):
        made.part(place, place + 1)
    assert 21 <= len(passes) <= 40


def test_no_window_grows_with_the_pool(monkeypatch):
    """Keys of weights near 1/N lie far from zero, where floats of equal leading bits do; samples without weight tie."""
    monkeypatch.setattr(key_order, "WINDOW", 300)
    generator = np.random.default_rng(0)
    keys = generator.gumbel(size=40_000) - 18
    keys[generator.random(len(keys)) < 0.3] = -np.inf
    made = Order(len(keys), lambda: (keys[one] for one in disk_arrays.blocks(len(keys), 5000)))
    whole, place, windows = np.argsort(-keys, kind="stable"), 0, 0
    while place < len(keys):
        part = made.part(place, len(keys))
        windows += 1
        assert len(part) <= 300
        assert (part == whole[place : place + len(part)]).all()
        place += len(part)
    assert windows < 1.1 * len(keys) / 300
    assert (made.part(39_000, 39_010) == whole[39_000:39_010]).all()


def test_with_the_constants_as_they_are():
    keys = np.random.default_rng(0).gumbel(size=key_order.WINDOW + 1000).round(5)
    strata, quota = np.arange(len(keys)) % 3, np.array([0, 100_000, 500_000])
    assert (largest(keys, quota, strata) == pools.largest(keys, quota, strata)).all()
    made = Order(len(keys), lambda: (keys[one] for one in disk_arrays.blocks(len(keys))))
    whole = np.argsort(-keys, kind="stable")
    for place in (len(keys) - 100, 0, key_order.WINDOW - 10_000):
        part = made.part(place, len(keys))
        assert len(part) >= 100
        assert (part == whole[place : place + len(part)]).all()
