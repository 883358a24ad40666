"""Samples that teach the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqlora_scale.common.copies import copy_groups
from tsqlora_scale.quality.draws import redundancy
from tsqlora_scale.quality.draws.redundancy import count_similar, groups, linked, neighbours, similar_pairs


def slow_pairs(sketches: np.ndarray, threshold: float) -> list[list[int]]:
    found = []
    for i in range(len(sketches)):
        for j in range(i + 1, len(sketches)):
            lengths = np.linalg.norm(sketches[i]) * np.linalg.norm(sketches[j])
            if np.isfinite(lengths) and lengths > 0 and sketches[i] @ sketches[j] / lengths >= threshold:
                found.append([i, j])
    return found


@settings(max_examples=40)
@given(st.integers(0, 30), st.integers(0, 2**31 - 1), st.sampled_from([0.3, 0.5, 0.9]))
def test_pairs_are_all_pairs(size, seed, threshold):
    sketches = np.random.default_rng(seed).normal(size=(size, 4)).astype(np.float32)
    sketches[: size // 6] = np.nan
    sketches[size // 6 : size // 4] = 0
    pairs = similar_pairs(sketches, threshold)
    assert pairs.tolist() == slow_pairs(sketches, threshold)
    counts = neighbours(pairs, size)
    assert counts.sum() == size + 2 * len(pairs)


@settings(max_examples=40)
@given(st.integers(0, 30), st.integers(0, 2**31 - 1), st.sampled_from([0.3, 0.7, 0.95]), st.sampled_from([2, 7, 100]))
def test_chains_are_those_of_all_pairs(size, seed, threshold, block):
    generator = np.random.default_rng(seed)
    sketches = generator.normal(size=(max(size // 3, 1), 3))[generator.integers(0, max(size // 3, 1), size)]
    sketches = (sketches + 0.2 * generator.normal(size=(size, 3))).astype(np.float32)
    sketches[: size // 8] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redundancy, "BLOCK", block)
        found = linked(sketches, threshold)
    assert found.tolist() == copy_groups(np.array(slow_pairs(sketches, threshold)).reshape(-1, 2), size).tolist()


def test_a_threshold_of_one_finds_all_copies():
    """The cosine of a vector with itself is a rounding below 1 every other time."""
    rows = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    pairs = similar_pairs(np.concatenate([rows, rows]), 1.0)
    assert pairs.tolist() == [[i, i + 200] for i in range(200)]


@pytest.mark.parametrize("block", [1, 7, 10**6])
def test_blocks_change_nothing(block, monkeypatch):
    sketches = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    expected = similar_pairs(sketches, 0.6)
    monkeypatch.setattr(redundancy, "BLOCK", block)
    assert (similar_pairs(sketches, 0.6) == expected).all()


def test_large_pools_find_nearly_all_by_hashing(monkeypatch):
    generator = np.random.default_rng(0)
    sketches = generator.normal(size=(600, 64)).astype(np.float32)
    sketches[300:] = sketches[:300] + 0.15 * generator.normal(size=(300, 64))  # cosines of about 0.99
    sketches[0] = sketches[300]
    expected = similar_pairs(sketches, 0.95)
    assert len(expected) == 300
    monkeypatch.setattr(redundancy, "ALL_PAIRS", 60)
    found = similar_pairs(sketches, 0.95)
    assert {tuple(pair) for pair in found} <= {tuple(pair) for pair in expected}
    assert len(found) >= 0.97 * len(expected)
    assert [0, 300] in found.tolist(), "identical ones always share a bucket"
    assert (similar_pairs(sketches, 0.95) == found).all()


def test_a_chain_is_not_one_group():
    pairs = np.array([[0, 1], [1, 2], [2, 3], [3, 4], [6, 7]])
    found = [group.tolist() for group in groups(pairs)]
    assert found == [[1, 0, 2], [3, 4], [6, 7]]
    assert groups(np.empty((0, 2), np.int64)) == []


@pytest.mark.parametrize("all_pairs", [10, 10**6])
@pytest.mark.parametrize("block", [1, 7, 10**6])
def test_counts_are_those_of_the_pairs(block, all_pairs, monkeypatch):
    """Also where several tables find the same pair."""
    generator = np.random.default_rng(1)
    sketches = generator.normal(size=(90, 6)).astype(np.float32)
    sketches[40:80] = sketches[:40] + 0.02 * generator.normal(size=(40, 6))
    sketches[80] = np.nan
    sketches[81] = 0
    monkeypatch.setattr(redundancy, "ALL_PAIRS", all_pairs)
    pairs = similar_pairs(sketches, 0.9)
    assert len(pairs) > 40
    monkeypatch.setattr(redundancy, "BLOCK", block)
    assert (count_similar(sketches, 0.9) == neighbours(pairs, 90)).all()
