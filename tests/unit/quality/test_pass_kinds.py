"""Which passes are made: losses alone, first order, or the exact loss reduction; decided once, on a few samples."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reference.rank_correlation import spearman
from tests.unit.quality.tables import assert_identical, assert_same_tables
from tests.unit.quality.toys import RandomPool, lora_model, scorer
from tests.unit.quality.world_worker import train_a_little
from tsqlora_scale.quality.scores import measurer, pass_kind
from tsqlora_scale.quality.scores.loss_reduction import first_order_will_do, rank_correlation

numbers = st.integers(-4, 4).map(float)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20))
def test_rank_correlation_equals_the_definition(pairs):
    a, b = np.array(pairs).T
    assert rank_correlation(a, b) == pytest.approx(spearman(a.tolist(), b.tolist()), abs=1e-12)


def values_of(exact, *, losses=(1.5, 4.5, 0.5), norms=(2.0, 4.0, 1.0)):
    return np.column_stack([losses, norms, exact])


@pytest.mark.parametrize(("eta", "eps", "below"), [(1e-9, 1e-7, True), (0.1, 1e-7, False), (0.1, 1.0, True)])
def test_steps_below_rounding(eta, eps, below):
    values = values_of([0.3, 0.2, 0.1])
    assert (first_order_will_do(values, eta=eta, rounding=eps, by_rank=False) is not None) == below


def test_what_ranks_alike_will_do():
    def why(exact, by_rank=True):
        return first_order_will_do(values_of(exact), eta=0.1, rounding=1e-7, by_rank=by_rank)

    assert "Spearman 1.0000" in why([0.3, 1.4, 0.09])
    assert why([0.3, 1.4, 0.09], by_rank=False) is None
    assert why([1.4, 0.3, 0.09]) is None
    assert why([np.nan] * 3) is None
    assert "2 samples" in why([0.3, 1.4, np.inf])


@given(st.integers(1, 9000), st.integers(1, 128))
def test_whole_batches_of_all_lengths_are_tried(size, batch_size):
    tried, rest = pass_kind._tried(size, batch_size)
    assert np.sort(np.concatenate([tried, rest])).tolist() == list(range(size))
    fewest = min(size, max(64, min(256, size // 16)))
    # the last batch may be short
    assert fewest - batch_size < len(tried) < fewest + batch_size + batch_size * (fewest < 2 * batch_size)
    for places in (tried, rest):  # no batch is cut in two, and the short one is the last of its own
        starts = places[places % batch_size == 0]
        assert all(np.isin(np.arange(start, min(start + batch_size, size)), places).all() for start in starts)
        assert set((places // batch_size).tolist()) == set((starts // batch_size).tolist())
    if len(rest):
        assert abs(tried.mean() - (size - 1) / 2) <= max(2 * batch_size, size / 50)


def kinds_measured(made):
    """What its measurer is asked for from now on: (kind, samples)."""
    asked, measure = [], made._measurer.measure

    def listening(indices, **options):
        asked.append((options["kind"], len(indices)))
        return measure(indices, **options)

    made._measurer.measure = listening
    return asked


def test_a_small_step_is_taken_by_first_order_after_a_few_samples(tiny_folder, monkeypatch):
    monkeypatch.setattr(pass_kind, "FEWEST", 5)
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 20)
    made = scorer(pool, delta_loss="auto", eta=1e-4, shard_size=12, refresh_fraction=0.5)
    asked = kinds_measured(made)
    table = made.score(model)
    assert asked == [("exact", 8), ("first_order", 4), ("first_order", 8)], "none is measured twice"
    assert made.measured["kind"] == "first_order"
    assert "Spearman" in made.measured["reason"]
    assert made.state_dict()["pass_kind"] == {"kind": "first_order", "reason": made.measured["reason"]}
    np.testing.assert_allclose(table.delta_loss, 1e-4 * table.grad_norm**2, rtol=1e-6)
    assert_same_tables(scorer(pool, delta_loss="first_order", eta=1e-4).score(model), table)
    del asked[:]
    made.score(train_a_little(model), refresh=True)
    assert asked == [("first_order", 10)], "decided for good"


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"eta": 30.0}, "exact"),  # such a step is far from its first order
        ({"eta": 1e-4, "preset": "paper"}, "exact"),
        ({"eta": 1e-4, "delta_loss": "exact"}, "exact"),
        ({"eta": 1e-10, "preset": "paper"}, "first_order"),
        ({"eta": 1e-10, "delta_loss": "exact"}, "first_order"),
    ],
)
def test_what_decides(options, kind, tiny_folder, monkeypatch):
    monkeypatch.setattr(pass_kind, "FEWEST", 5)
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 12)
    made = scorer(pool, **{"delta_loss": "auto"} | options)
    asked = kinds_measured(made)
    table = made.score(model)
    assert asked == [("exact", 8), (kind, 4)]
    if kind == "exact":
        assert_same_tables(
            scorer(pool, **options | {"delta_loss": "exact"}, shard_size=3).score(model), table, atol=1e-4
        )


def test_a_run_that_asked_for_the_exact_one_is_warned(tiny_folder, caplog):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 9)
    with caplog.at_level(logging.WARNING, "tsqlora_scale"):
        scorer(pool, delta_loss="auto", eta=1e-9).score(model)
        assert not [record for record in caplog.records if record.name == "tsqlora_scale"]
        scorer(pool, delta_loss="exact", eta=1e-9).score(model)
    assert "using the first order" in caplog.text


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("few", [4, 6])
def test_a_killed_pass_keeps_the_decision(after, few, tiny_folder, tmp_path, monkeypatch):
    """Also where the first shard is no larger than what is tried."""
    monkeypatch.setattr(pass_kind, "FEWEST", few)
    monkeypatch.setattr(measurer, "fitting_batch", lambda *_: 2)
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 20)
    options = {"delta_loss": "auto", "eta": 1e-4, "shard_size": 6, "batch_size": "auto"}
    expected = scorer(pool, **options).score(model)
    made = scorer(pool, **options, parts_folder=tmp_path / "parts")
    measure, calls = made._measurer.measure, []

    def until_killed(*args, **options):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(args)
        return measure(*args, **options)

    made._measurer.measure = until_killed
    with pytest.raises(KeyboardInterrupt):
        made.score(model)
    again = scorer(pool, **options, parts_folder=tmp_path / "parts")
    asked = kinds_measured(again)
    assert_identical(expected, again.score(model))
    finished = after - (few < 6)
    assert ("exact" in dict(asked)) == (finished == 0)
    assert "Spearman" in again.measured["reason"]


def test_a_trend_of_losses_needs_no_gradients(tiny_folder):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 9)
    options = {"convergence": "loss_trend", "refresh_fraction": 1.0}
    whole = scorer(pool, weights=[0, 1e-300, 1], **options)
    made = scorer(pool, weights=[0, 0, 1], **options)
    backward = torch.autograd.backward
    try:
        torch.autograd.backward = None
        tables = [made.score(model), made.score(train_a_little(model), refresh=True)]
    finally:
        torch.autograd.backward = backward
    expected = [whole.score(model), whole.score(train_a_little(model), refresh=True)]
    for found, wanted in zip(tables, expected, strict=True):
        for name in ("loss", "convergence", "quality", "probability"):
            np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-6)
        assert np.isnan(found.grad_norm).all()
        assert np.isnan(found.delta_loss).all()
    assert made.measured["kind"] == "loss"
    assert made.report.not_finite == 0


def test_losses_of_a_pool_between_other_passes(tiny_folder):
    """As other selectors ask for them: on the same measurer, whatever it measured before."""
    model, pool = lora_model("deberta", tiny_folder), RandomPool("deberta", 9)
    made = scorer(pool, batch_size="auto")
    table = made.score(model)
    with made._measurer.on(model):
        part = made._measurer.measure(np.arange(9), kind="loss")
        again = made._measurer.measure(np.arange(9), kind="exact")
    np.testing.assert_allclose(part.values[:, 0], table.loss, rtol=1e-5)
    assert np.isnan(part.values[:, 1:]).all()
    assert part.sketches.shape == (9, 0)
    assert part.kind == "loss"
    np.testing.assert_allclose(again.values[:, 1], table.grad_norm, rtol=1e-5)


def test_samples_of_one_length_say_nothing_of_padding():
    """Five of eight samples are the longest of their batches, right whatever padding does."""
    ordinary = torch.tensor([[0.7, 2.0, 0.1]] * 8).double()
    found = ordinary.clone()
    found[:3, 1] = 3.0
    padded = torch.tensor([True] * 3 + [False] * 5)
    agree = measurer.Measurer._agree
    assert agree(found, ordinary, 1.2e-7)
    assert not agree(found, ordinary, 1.2e-7, padded=padded)
    assert agree(ordinary, ordinary, 1.2e-7, padded=padded)
    assert agree(found, ordinary, 1.2e-7, padded=torch.zeros(8, dtype=torch.bool)), "none is padded: all count"


def test_a_model_that_minds_padding_is_scored_one_at_a_time(tiny_folder, caplog):
    """Though most of the samples have the length of the longest."""
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 16)
    pool.tokens = [np.arange(5, 17)[: 12 if i >= 6 else 4 + i % 3] for i in range(16)]
    batch = pool.batch

    def unmasked(indices, **options):
        found = batch(indices, **options)
        found.inputs["attention_mask"] = torch.ones_like(found.inputs["attention_mask"])
        return found

    pool.batch = unmasked
    made = scorer(pool, batch_size=8, delta_loss="first_order")
    with caplog.at_level(logging.WARNING, "tsqlora_scale"):
        made.score(model)
    assert made.report.one_at_a_time
