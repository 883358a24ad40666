"""Pools whose columns are mapped to disk and worked through block by block: the same to the bit."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import pools
from tests.unit.quality.toys import RandomPool, lora_model, scorer
from tests.unit.quality.world_worker import train_a_little
from tsqlora_scale.common import disk_arrays
from tsqlora_scale.common.random_streams import gumbel, philox
from tsqlora_scale.config.schema import SamplingConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality import BatchSampler, ScoreTable, importance_weights, select_subset
from tsqlora_scale.quality.draws import key_order
from tsqlora_scale.quality.draws.subset import quotas, renormalised, share_of
from tsqlora_scale.quality.scores.equations import Standardisation, log_probabilities, mean_of


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch):
    """From when it is called on, a handful of samples is a large pool."""

    def begin(block: int = 7) -> None:
        monkeypatch.setattr(disk_arrays, "IN_MEMORY", 0)
        monkeypatch.setattr(disk_arrays, "BLOCK", block)
        monkeypatch.setattr(key_order, "WINDOW", 5)
        monkeypatch.setattr(key_order, "BITS", 14)

    return begin


def is_mapped(column: np.ndarray) -> bool:
    while isinstance(column.base, np.ndarray):
        column = column.base
    return isinstance(column.base, mmap.mmap)


def assert_identical(one: ScoreTable, other: ScoreTable, rtol: float = 0) -> None:
    for name, column in one.state_dict().items():
        found = getattr(other, name)
        assert found.dtype == column.numpy().dtype
        np.testing.assert_allclose(found, column.numpy(), rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize("block", [2**20, 7])
@pytest.mark.parametrize(
    ("scoring", "sampling", "strata"),
    [
        ({}, {"keep_fraction": 0.5}, None),
        ({"preset": "paper", "max_samples": 17}, {"keep_fraction": 0.7}, [0, 1, 2]),
        ({"convergence": "loss_trend", "delta_loss": "first_order"}, {"selector": "random", "keep_fraction": 0.5}, [0]),
        ({"eta": 1e-9, "refresh_fraction": 1.0}, {"selector": "full"}, None),
        ({}, {"redundancy": 1.0, "keep_fraction": 0.5}, [0, 1]),
    ],
)
def test_passes_tables_and_draws(scoring, sampling, strata, block, large, tiny_folder, tmp_path):
    """To the bit; in blocks up to the last bit of Q, whose product with the weights is rounded by a row's place."""
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 40)
    moved, ids = train_a_little(model), [f"sample {i}" for i in range(40)]
    pool.ids = ids
    with_nan = train_a_little(model)

    def life(folder: Path) -> tuple:
        made = scorer(pool, sampling=sampling, **{"shard_size": 9, "refresh_fraction": 0.6} | scoring)
        made.strata = None if strata is None else np.resize(strata, 40).astype(np.int32)
        first = made.score(model)
        second = made.score(moved, refresh=True)
        again = scorer(pool, sampling=sampling, **{"shard_size": 9, "refresh_fraction": 0.6} | scoring)
        again.strata = made.strata
        again.load_state_dict(made.state_dict())
        third = again.score(with_nan, refresh=True)
        second.write(folder, ids)
        read, read_ids = ScoreTable.read(folder)
        assert_identical(second, read)
        assert read_ids == ids
        chosen, weights = again.draws()
        tables = (first, second, third)
        numbers = [table.mean_quality() for table in tables] + [table.effective_sample_size() for table in tables]
        return tables, chosen, weights, numbers, made.state_dict()["standardisation"]

    expected = life(tmp_path / "small")
    large(block)
    found = life(tmp_path / "large")
    rtol = 0 if block > 40 else 1e-14
    for one, other in zip(expected[0], found[0], strict=True):
        assert_identical(one, other, rtol)
    assert is_mapped(found[0][2].quality) and not is_mapped(expected[0][2].quality)
    assert (found[1] == expected[1]).all()
    np.testing.assert_allclose(found[2], expected[2], rtol=rtol)
    np.testing.assert_allclose(found[3], expected[3], rtol=rtol)
    assert all((found[4][key] == expected[4][key]).all() for key in ("mean", "std"))


def test_a_sample_that_is_not_finite(large, tiny_folder):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 25)
    bad = 7
    pool.tokens = [np.where(tokens == bad, 5, tokens) for tokens in pool.tokens]
    for sample in (2, 6, 7, 20, 24):
        pool.tokens[sample][0] = bad
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = float("nan")
    expected = scorer(pool, batch_size=5).score(model)
    assert np.isnan(expected.loss).sum() == 5
    large()
    made = scorer(pool, batch_size=5)
    assert_identical(expected, made.score(model))
    assert made.report.not_finite == 5


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_samplers(weighted, replacement, large):
    weights = np.random.default_rng(0).random(50) if weighted else None
    if weights is not None:
        weights[::7] = 0

    def life() -> tuple:
        sampler = BatchSampler(np.arange(50) * 3, weights, batch_size=8, seed=0, replacement=replacement)
        return [sampler.draw(step).tolist() for step in range(20)], sampler.fingerprint()

    expected = life()
    large()
    assert life() == expected


@settings(max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.floats(0.01, 1), st.integers(0, 2**31 - 1))
def test_subset_and_weights(sizes, fraction, seed):
    generator = np.random.default_rng(seed)
    strata = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    size = len(strata)
    quality = generator.normal(size=size).round(1)
    with pytest.MonkeyPatch.context() as patch:
        for round_ in range(2):
            log_p = log_probabilities(quality, 0.7, World(), strata)
            member = select_subset(size, log_p, SamplingConfig(keep_fraction=fraction), seed=seed, strata=strata)
            weights = renormalised(np.exp(log_p[member]), strata[member], np.array(sizes))
            results = [log_p, member, weights, importance_weights(weights, 3.0)]
            if round_ == 0:
                expected = results
                patch.setattr(disk_arrays, "IN_MEMORY", 0)
                patch.setattr(disk_arrays, "BLOCK", 7)
    assert all((one == other).all() for one, other in zip(results, expected, strict=True))
    quota = quotas(np.bincount(strata, minlength=len(sizes)), share_of(fraction, size))
    keys = log_p + pools.gumbel(philox(seed, "select"), size)
    assert (member == pools.largest(keys, quota, strata)).all()
    mass = np.bincount(strata[member], np.exp(log_p[member]), minlength=len(sizes))
    shares = np.where(quota > 0, sizes, 0) / np.where(quota > 0, sizes, 0).sum()
    of = strata[member]
    assert (weights == np.exp(log_p[member]) * (shares / np.maximum(mass, np.finfo(float).tiny))[of]).all()


def test_a_stream_of_random_numbers_is_one_however_it_is_cut(large):
    expected = pools.gumbel(philox(3, "select"), 40)
    assert (gumbel(philox(3, "select"), 40) == expected).all()
    large()
    assert is_mapped(gumbel(philox(3, "select"), 40))
    assert (gumbel(philox(3, "select"), 40) == expected).all()
    generator = philox(3, "select")
    assert np.concatenate([gumbel(generator, n) for n in (7, 1, 32)]).tolist() == expected.tolist()


@settings(max_examples=60)
@given(st.integers(1, 300), st.integers(1, 50), st.integers(0, 2**31 - 1))
def test_constants_are_the_same_however_the_rows_are_cut(size, block, seed):
    terms = np.random.default_rng(seed).normal(size=(size, 3)) * [1e-3, 1, 1e5]
    cut = [terms[one] for one in disk_arrays.blocks(size, block)]
    assert (mean_of(cut) == terms.mean(axis=0)).all()
    made = Standardisation()
    made.fit(lambda: cut)
    if (terms.std(axis=0) > 1e-6 * np.abs(terms).max(axis=0)).all():
        assert (made.std == terms.std(axis=0)).all()
        assert (made.mean == terms.mean(axis=0)).all()
    else:
        assert size == 1


def test_a_disk_without_room_is_named(large, tiny_folder, tmp_path, monkeypatch):
    from tsqlora_scale.common.errors import UserError

    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 9)
    large()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="TMPDIR"):
        scorer(pool).score(model)
