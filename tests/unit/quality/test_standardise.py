"""z-scores, weights, and the global softmax."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import logsumexp

from tests.reference.quality import probabilities, quality
from tsqlora_scale.config.schema import ScoringConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality.scores import equations
from tsqlora_scale.quality.scores.equations import (
    TERM_WEIGHTS,
    Standardisation,
    log_probabilities,
    log_sum_exp,
    term_weights,
)


class ThreadWorld(World):
    """Ranks as threads; the reductions see nothing but what each rank hands in."""

    def __init__(self, rank: int, size: int, board: list, barrier: threading.Barrier) -> None:
        super().__init__(rank, size)
        self.board, self.barrier = board, barrier

    def gather_objects(self, value):
        self.board[self.rank] = value
        self.barrier.wait()
        values = list(self.board)
        self.barrier.wait()
        return values

    def sum(self, tensor):
        return torch.stack(self.gather_objects(tensor)).sum(0)

    def max(self, tensor):
        return torch.stack(self.gather_objects(tensor)).amax(0)


def on_ranks(size: int, function):
    board, barrier = [None] * size, threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: function(ThreadWorld(rank, size, board, barrier)), range(size)))


def shares_of(values: np.ndarray, size: int) -> list[np.ndarray]:
    return {1: [values], 2: [values[:1], values[1:]], 3: np.array_split(values, [1, 3])}[size]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("block", [1, 3, 100])
def test_log_sum_exp_is_global_and_stable(size, block, monkeypatch):
    monkeypatch.setattr(equations, "BLOCK", block)
    values, strata = np.array([1000.0, -1000.0, 999.0, 3.0]), np.array([0, 2, 0, 2])
    found = on_ranks(size, lambda world: log_sum_exp(values, strata, 3, world))
    for one in found:
        np.testing.assert_allclose(one, [logsumexp(values[[0, 2]]), -np.inf, logsumexp(values[[1, 3]])], atol=1e-12)


@pytest.mark.parametrize("strata", [None, np.array([2, 0, 1, 1, 2, 2, 0, 1, 1, 1, 2, 0, 0, 0, 2, 2, 1])])
def test_probabilities_are_the_same_on_any_number_of_ranks(strata, monkeypatch):
    monkeypatch.setattr(equations, "BLOCK", 3)
    values = np.random.default_rng(0).normal(size=17)
    found = [
        log_p for size in (1, 2, 5) for log_p in on_ranks(size, lambda w: log_probabilities(values, 0.7, w, strata))
    ]
    for log_p in found:
        np.testing.assert_allclose(np.exp(log_p), probabilities(values, 0.7, strata), rtol=1e-12)
        assert (log_p == found[0]).all()


@settings(max_examples=60)
@given(
    arrays(np.float64, 12, elements=st.floats(-50, 50)),
    arrays(np.int64, 12, elements=st.integers(0, 3)),
    st.floats(0.01, 10),
)
def test_every_stratum_has_the_mass_of_its_size(values, labels, tau):
    strata = np.unique(labels, return_inverse=True)[1]
    p = np.exp(log_probabilities(values, tau, World(), strata))
    np.testing.assert_allclose(np.bincount(strata, p), np.bincount(strata) / 12, rtol=1e-9)


@settings(max_examples=60)
@given(arrays(np.float64, (20, 3), elements=st.floats(-100, 100), unique=True))
def test_quality_is_the_weighted_sum_of_clipped_z_scores(terms):
    standardisation = Standardisation()
    standardisation.fit(lambda: [terms])
    weights = (0.5, 0.2, 0.3)
    if (standardisation.std > 0).all():
        np.testing.assert_allclose(standardisation.z(terms) @ weights, quality(terms, weights), atol=1e-9)
    assert np.abs(standardisation.z(terms * 50)).max() <= 3


def test_constants_of_the_first_pass_stay():
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(50, 3)), generator.normal(5, 3, size=(50, 3))
    standardisation = Standardisation()
    standardisation.fit(lambda: [first])
    expected = standardisation.z(second)
    standardisation.fit(lambda: [second])
    assert (standardisation.z(second) == expected).all()
    restored = Standardisation()
    restored.load_state_dict(standardisation.state_dict())
    assert (restored.z(second) == expected).all()


def test_a_term_without_spread_counts_zero_until_it_spreads():
    terms = np.random.default_rng(0).normal(size=(50, 3))
    flat = terms.copy()
    flat[:, 2] = 0.7 + 1e-9 * terms[:, 2]
    standardisation = Standardisation()
    standardisation.fit(lambda: [flat])
    assert (standardisation.z(flat)[:, 2] == 0).all()
    standardisation.fit(lambda: [terms])
    np.testing.assert_allclose(standardisation.z(terms).std(axis=0), 1, atol=0.05)


def test_presets_keep_all_three_terms_and_weights_override_them():
    for name, preset in TERM_WEIGHTS.items():
        assert all(weight > 0 for weight in preset)
        assert sum(preset) == pytest.approx(1)
        assert term_weights(ScoringConfig(preset=name)).tolist() == list(preset)
    assert TERM_WEIGHTS["paper"] == (1 / 3, 1 / 3, 1 / 3)
    assert term_weights(ScoringConfig(preset="paper", weights=[1, -2, 0])).tolist() == [1, -2, 0]


def test_the_gate_counts_only_against():
    terms = np.array([[1.0, 2.0, 0.5], [2.0, 1.0, 0.1], [3.0, 0.0, -0.2], [4.0, 5.0, -0.4]])
    gated, linear = Standardisation(gate=True), Standardisation()
    for one in (gated, linear):
        one.fit(lambda: [terms])
    found = gated.z(terms)
    np.testing.assert_allclose(found[:, :2], linear.z(terms)[:, :2])
    np.testing.assert_allclose(found[:, 2], np.array([0, 0, -0.2, -0.4]) / terms[:, 2].std())
    assert (Standardisation(gate=True).z(terms) == 0).all(), "nothing is known before the first pass"


@settings(max_examples=50)
@given(st.integers(2, 40), st.integers(0, 2**31), st.floats(0.05, 5.0))
def test_the_equations_to_the_letter(size: int, seed: int, tau: float) -> None:
    """Of one pass, one stratum and one rank, without a gate, quality and log p are Eq. 1 and 2 as they are written."""
    generator = np.random.default_rng(seed)
    terms, weights = generator.normal(size=(size, 3)), generator.normal(size=3)
    constants = Standardisation()
    constants.fit(lambda: [terms])
    found = equations.quality(terms, constants, weights)
    np.testing.assert_allclose(found, equations.equation_1(terms, weights), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found, quality(terms, weights), rtol=1e-12, atol=1e-12)
    p = np.exp(log_probabilities(found, tau, World()))
    np.testing.assert_allclose(p, equations.equation_2(found, tau), rtol=1e-9)
    np.testing.assert_allclose(p, probabilities(found, tau), rtol=1e-9)
