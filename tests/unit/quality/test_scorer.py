"""Scoring passes against the reference; what is kept between them; worlds of several processes."""

from __future__ import annotations

import copy
import io
import logging

import numpy as np
import pytest
import torch

from tests.reference.quality import quality, score_one_by_one
from tests.unit.quality import world_worker
from tests.unit.quality.tables import assert_identical, assert_same_tables
from tests.unit.quality.toys import KINDS, Batch, RandomPool, lora_model, scorer
from tests.unit.quality.world_worker import train_a_little
from tests.worlds import run_on_ranks
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality import ScoreTable
from tsqlora_scale.quality.scores import measurer

ETA = 0.1


def reference(model, pool, **options):
    return score_one_by_one(model, pool.singles(), lambda m, b: pool.losses(m, b)[0], eta=ETA, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_the_reference(kind, tiny_folder):
    model, pool = lora_model(kind, tiny_folder), RandomPool(kind, 9)
    expected = reference(model, pool)
    dim = 8192  # wide enough for the sketch's error to be small against the spread of the cosines
    made = scorer(pool, sketch_dim=dim, preset="paper", eta=ETA)
    table = made.score(model)
    np.testing.assert_allclose(table.loss, expected.loss, rtol=1e-4)
    np.testing.assert_allclose(table.grad_norm, expected.grad_norm, rtol=1e-4)
    np.testing.assert_allclose(table.delta_loss, expected.delta_loss, rtol=1e-4, atol=2e-6 * expected.loss.max())
    np.testing.assert_allclose(table.convergence, expected.alignment(), atol=4 / dim**0.5)
    terms = np.stack([table.grad_norm, table.delta_loss, table.convergence], 1)
    np.testing.assert_allclose(table.quality, quality(terms, [1 / 3] * 3), atol=1e-6)
    weights = np.exp(table.quality / 0.7)
    np.testing.assert_allclose(table.probability, weights / weights.sum(), rtol=1e-9)
    assert not made.report.one_at_a_time
    assert made.report.samples == 9
    assert table.selected.all()
    assert (table.scoring_pass == 0).all()


@pytest.mark.parametrize(
    ("options", "gate"),
    [
        ({}, True),
        ({"preset": "paper"}, False),
        ({"preset": "paper", "convergence_form": "gate"}, True),
        ({"convergence_form": "linear"}, False),
    ],
)
def test_form_of_the_convergence_term(options, gate, tiny_folder):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 9)
    table = scorer(pool, eta=ETA, **options).score(model)
    terms = np.stack([table.grad_norm, table.delta_loss, table.convergence], 1)
    assert (terms[:, 2] < 0).any()
    weights = [1 / 3] * 3 if options.get("preset") == "paper" else [0.1, 0.1, 0.8]
    np.testing.assert_allclose(table.quality, quality(terms, weights, gate=gate), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "unit"),
    [({}, True), ({"preset": "paper", "mean_gradient": "unit"}, True), ({"mean_gradient": "plain"}, False)],
)
def test_direction_of_alignment(options, unit, tiny_folder):
    model, pool, dim = lora_model("bert", tiny_folder), RandomPool("bert", 9), 8192
    expected = reference(model, pool)
    table = scorer(pool, sketch_dim=dim, **options).score(model)
    direction = expected.unit_mean() if unit else None
    assert np.abs(expected.alignment(expected.unit_mean()) - expected.alignment()).max() > 8 / dim**0.5
    np.testing.assert_allclose(table.convergence, expected.alignment(direction), atol=4 / dim**0.5)


def test_first_order_and_head(tiny_folder):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 9)
    expected = reference(model, pool, include_head=True)
    table = scorer(pool, delta_loss="first_order", include_head=True, eta=ETA).score(model)
    np.testing.assert_allclose(table.grad_norm, expected.grad_norm, rtol=1e-4)
    np.testing.assert_allclose(table.delta_loss, ETA * expected.grad_norm**2, rtol=1e-4)


def test_loss_trend_is_blind_at_first_and_then_previous_minus_now(tiny_folder):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 9)
    made = scorer(pool, convergence="loss_trend", weights=[0, 0, 1], refresh_fraction=1.0)
    first = made.score(model)
    assert made.parts[0].sketches.shape == (9, 0)
    assert (first.convergence == 0).all()
    assert (first.quality == 0).all()
    second = made.score(train_a_little(model), refresh=True)
    np.testing.assert_allclose(second.convergence, first.loss - second.loss)
    z = (second.convergence - second.convergence.mean()) / second.convergence.std()
    np.testing.assert_allclose(second.quality, z.clip(-3, 3))


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_scores_do_not_depend_on_batch_size_or_order(kind, tiny_folder):
    model, pool = lora_model(kind, tiny_folder), RandomPool(kind, 11)
    whole = scorer(pool, batch_size=16).score(model)
    for size in (1, 3):
        assert_same_tables(whole, scorer(pool, batch_size=size).score(model))
    pool.lengths = lambda: np.zeros(11, dtype=int)
    unsorted = scorer(pool, batch_size=4)
    assert_same_tables(whole, unsorted.score(model))
    del pool.lengths
    again = scorer(pool, batch_size=16).score(model)
    assert_identical(whole, again)


def test_training_continues_as_if_nothing_had_been_scored(tiny_folder):
    pool = RandomPool("bert", 8)

    def trajectory(scored: bool) -> list[float]:
        model = lora_model("bert", tiny_folder)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for step in range(4):
                loss = pool.losses(model, pool.batch(np.arange(8))).mean()
                loss.backward()
                if scored and step == 1:  # in the middle of a step: gradients are there and stay
                    scorer(pool).score(model)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses

    assert trajectory(True) == trajectory(False)


def test_a_refresh_scores_a_share_of_the_subset_and_keeps_the_rest(tiny_folder):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 20)
    made = scorer(pool, refresh_fraction=0.35, sampling={"keep_fraction": 0.5})
    first = made.score(model)
    kept = copy.deepcopy(first)
    second = made.score(train_a_little(model), refresh=True)
    third = made.score(train_a_little(model), refresh=True)
    fresh = second.scoring_pass == 1
    assert first.selected.sum() == 10
    assert fresh.sum() == 4  # ceil(0.35 * 10)
    assert first.selected[fresh].all()
    assert (second.loss[fresh] != first.loss[fresh]).all()
    assert ((third.scoring_pass == 2) != fresh).any(), "every refresh draws anew"
    for name in ("loss", "grad_norm", "delta_loss", "convergence", "quality"):
        assert (getattr(second, name)[~fresh] == getattr(first, name)[~fresh]).all()
    assert (second.selected == first.selected).all()
    assert second.probability.sum() == pytest.approx(1)
    assert_identical(kept, first)
    # the first pass's constants: z of the norms, by hand
    paper = scorer(pool, weights=[1, 0, 0], refresh_fraction=1.0)
    start = paper.score(model)
    after = paper.score(train_a_little(model), refresh=True)
    z = (after.grad_norm - start.grad_norm.mean()) / start.grad_norm.std()
    np.testing.assert_allclose(after.quality, z.clip(-3, 3))


@pytest.mark.parametrize("form", ["linear", "gate"])
def test_unscored_samples_get_the_mean(form, tiny_folder):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 20)
    made = scorer(pool, max_samples=8, convergence_form=form)
    table = made.score(model)
    scored = table.scoring_pass == 0
    assert scored.sum() == 8
    assert (table.scoring_pass[~scored] == -1).all()
    for name in ("quality", "loss", "grad_norm", "delta_loss", "convergence"):
        np.testing.assert_allclose(getattr(table, name)[~scored], getattr(table, name)[scored].mean(), atol=1e-12)
    whole = scorer(pool).score(model)
    np.testing.assert_allclose(table.grad_norm[scored], whole.grad_norm[scored], rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_sample_that_is_not_finite_gets_the_lowest_quality(batch_size, tiny_folder, caplog):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 9)
    bad = int(pool.tokens[4][0])
    pool.tokens = [np.where(tokens == bad, 5, tokens) for tokens in pool.tokens]
    pool.tokens[4][0] = bad
    clean = reference(model, pool)
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = float("nan")
    with caplog.at_level(logging.WARNING, "tsqlora_scale"):
        made = scorer(pool, batch_size=batch_size)
        table = made.score(model)
    assert made.report.not_finite == 1
    assert "sample-4" in caplog.text
    others = np.arange(9) != 4
    assert not np.isfinite(table.loss[4])
    assert table.quality[4] == table.quality.min() == table.quality[others].min()
    np.testing.assert_allclose(table.grad_norm[others], clean.grad_norm[others], rtol=1e-4)
    assert np.isfinite(table.probability).all()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="diverged"):
        made.score(model, refresh=True)


def test_state_round_trip_continues_exactly(tiny_folder):
    model, pool = lora_model("deberta", tiny_folder), RandomPool("deberta", 12)
    made = scorer(pool, sampling={"keep_fraction": 0.5}, refresh_fraction=0.5)
    made.score(model)
    buffer = io.BytesIO()
    torch.save(made.state_dict(), buffer)
    buffer.seek(0)
    restored = scorer(pool, sampling={"keep_fraction": 0.5}, refresh_fraction=0.5)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    moved = train_a_little(model)
    expected, found = made.score(moved, refresh=True), restored.score(moved, refresh=True)
    assert_identical(expected, found)
    assert found.scoring_pass.max() == 1
    pool.ids = pool.ids[::-1]
    other = scorer(pool)
    with pytest.raises(UserError, match="another pool"):
        other.load_state_dict(made.state_dict())


class Mixes(torch.nn.Module):
    """A forward in which samples touch each other: the adapters see the batch's dimension, and yet it is no batch."""

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(6, 6)

    def forward(self, x):
        hidden = self.proj(x)
        return (hidden * hidden.mean(0, keepdim=True)).sum((1, 2))


def test_numbers_that_differ_from_a_sample_alone_end_batching(caplog):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Mixes(), LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False))
    pool = RandomPool("bert", 6)
    x = torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(0))
    pool.batch = lambda indices, **_: Batch({"x": x[torch.as_tensor(indices)]}, torch.zeros(len(indices)))
    pool.losses = lambda module, batch: module(**batch.inputs)
    made = scorer(pool, batch_size=3, delta_loss="first_order")
    with caplog.at_level(logging.WARNING, "tsqlora_scale"):
        table = made.score(model)
    assert made.report.one_at_a_time
    assert "one sample at a time" in caplog.text
    assert_same_tables(table, scorer(pool, batch_size=1, delta_loss="first_order").score(model))


def test_a_later_batch_without_the_batch_dimension_is_noticed(tiny_folder, caplog):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 9)
    calls = []

    def losses(module, batch):  # from some batch on, an adapter is also called without the batch
        calls.append(batch.size)
        values = RandomPool.losses(pool, module, batch)
        if batch.size > 1 and len(calls) > 8:
            module.base_model.model.bert.encoder.layer[0].attention.self.query(torch.zeros(1, 3, 32))
        return values

    pool.losses = losses
    made = scorer(pool, batch_size=4, delta_loss="first_order")
    with caplog.at_level(logging.WARNING, "tsqlora_scale"):
        made.score(model)
        table = made.score(model)
    assert made.report.one_at_a_time
    assert "a later batch" in caplog.text
    assert table.scoring_pass.tolist() == [1] * 9


def test_a_step_too_small_to_see_falls_back_to_first_order(tiny_folder, caplog):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 9)
    with caplog.at_level(logging.WARNING, "tsqlora_scale"):
        table = scorer(pool, eta=1e-9).score(model)
    assert "scoring.eta" in caplog.text
    np.testing.assert_allclose(table.delta_loss, 1e-9 * table.grad_norm**2)
    assert np.corrcoef(table.delta_loss, table.grad_norm)[0, 1] > 0.9


def test_progress_counts_samples(tiny_folder):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 9)
    seen = []
    made = scorer(pool, shard_size=6)
    made.progress = lambda done, total: seen.append((done, total))
    made.score(model)
    assert seen == [(4, 9), (6, 9), (9, 9)]


def test_shards_change_nothing_but_batches(tiny_folder):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 11)
    whole = scorer(pool).score(model)
    for size in (1, 4, 5):
        made = scorer(pool, shard_size=size)
        assert_same_tables(whole, made.score(model))
        assert len(made.parts) == -(-11 // size)


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 2, 3])
@pytest.mark.parametrize("batch_size", [2, "auto"])
def test_a_killed_pass_goes_on_to_the_identical_table(batch_size, after, tiny_folder, tmp_path, monkeypatch):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 11)
    options = {"shard_size": 3, "batch_size": batch_size}
    monkeypatch.setattr(measurer, "fitting_batch", lambda *_: 2)
    expected = scorer(pool, **options).score(model)
    made = scorer(pool, **options, parts_folder=tmp_path / "parts")
    shard, calls = made._measurer.measure, []

    def until_killed(*args, **options):
        if len(calls) == after:
            raise Killed
        calls.append(args)
        return shard(*args, **options)

    made._measurer.measure = until_killed
    with pytest.raises(Killed):
        made.score(model)
    if after:  # less memory is free than before: the batches stay the same
        monkeypatch.setattr(measurer, "fitting_batch", lambda *_: 1)
    again, measured = scorer(pool, **options, parts_folder=tmp_path / "parts"), []
    rest = again._measurer.measure
    again._measurer.measure = lambda *args, **options: measured.append(args) or rest(*args, **options)
    assert_identical(expected, again.score(model))
    assert len(measured) == 4 - after, "finished shards are read"


@pytest.mark.parametrize("change", ["weights", "eta", "sketch_dim", "pool", "file"])
def test_parts_of_something_else_are_removed(change, tiny_folder, tmp_path):
    """Other weights, settings or samples than those that the parts were made with, or what is no part."""
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 7)
    folder = tmp_path / "parts"
    made = scorer(pool, parts_folder=folder, shard_size=3)
    made.score(model)
    options: dict = {"shard_size": 3}
    if change == "weights":
        model = train_a_little(model)
    elif change == "pool":
        pool.ids = pool.ids[::-1]
    elif change == "file":
        (folder / "pass-000" / "000001.parquet").write_bytes(b"no parquet")
    else:
        options[change] = {"eta": 0.2, "sketch_dim": 32}[change]
    again, measured = scorer(pool, parts_folder=folder, **options), []
    shard = again._measurer.measure
    again._measurer.measure = lambda *args, **kwargs: measured.append(args) or shard(*args, **kwargs)
    assert_identical(scorer(pool, **options).score(model), again.score(model))
    assert len(measured) == 3, "every shard is measured again"


def test_parts_of_the_pass_before_are_removed(tiny_folder, tmp_path):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 7)
    made = scorer(pool, parts_folder=tmp_path / "parts")
    made.score(model)
    made.score(model, refresh=True)
    assert [folder.name for folder in (tmp_path / "parts").iterdir()] == ["pass-001"]
    made.discard_parts()
    assert not (tmp_path / "parts").exists()


def test_a_failed_allocation_halves_the_batch_and_goes_on(tiny_folder, caplog):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 11)
    expected = scorer(pool, batch_size=8).score(model)
    sizes = []

    def losses(module, batch):
        if batch.size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(batch.size)
        return RandomPool.losses(pool, module, batch)

    made = scorer(pool, batch_size=8)
    made._measurer.losses = losses
    with caplog.at_level(logging.WARNING, "tsqlora_scale"):
        assert_same_tables(expected, made.score(model))
    assert max(sizes) == 2
    assert [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()] == [
        "out of memory while scoring 8 samples at once; going on with 4",
        "out of memory while scoring 4 samples at once; going on with 2",
    ]
    made._measurer.losses = lambda module, batch: (_ for _ in ()).throw(torch.OutOfMemoryError("all is full"))
    with pytest.raises(UserError, match=r"single sample \(all is full\).*scoring.max_length"):
        made.score(model)


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        if len(gradient) > 2:
            raise torch.OutOfMemoryError("backward")
        return gradient


@pytest.mark.parametrize("batch_size", [8, "auto"])
@pytest.mark.parametrize("place", ["forward", "backward", "step", "sketch"])
def test_memory_may_run_out_in_the_probe_the_check_and_the_pass(place, batch_size, tiny_folder, monkeypatch, caplog):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 11)
    expected = scorer(pool, batch_size=8).score(model)
    made = scorer(pool, batch_size=batch_size)

    def losses(module, batch):
        if batch.size > 2 and place == ("forward" if torch.is_grad_enabled() else "step"):
            raise torch.OutOfMemoryError(place)
        values = RandomPool.losses(pool, module, batch)
        return FailsBackward.apply(values) if place == "backward" else values

    sketch = made._measurer._sketch

    def sketched(gradients):
        if place == "sketch" and len(next(iter(gradients.values()))) > 2:
            raise torch.OutOfMemoryError(place)
        return sketch(gradients)

    made._measurer.losses, made._measurer._sketch = losses, sketched
    with caplog.at_level(logging.WARNING, "tsqlora_scale"):
        assert_same_tables(expected, made.score(model))
    assert made._measurer._fits in (1, 2)
    assert "out of memory" in caplog.text
    assert not made._measurer.one_at_a_time


def agrees(together, alone, eps=1.2e-7):
    return measurer.Measurer._agree(torch.tensor(together).double(), torch.tensor(alone).double(), eps)


def test_whether_batches_agree_with_samples_alone():
    ordinary = [[0.7, 2.0, 0.1]] * 8
    assert agrees(ordinary, ordinary)
    wrong = [[0.7, 3.0, 0.1]] * 8
    assert not agrees(wrong, ordinary), "all are wrong"
    assert agrees([*wrong[:3], *ordinary[3:]], ordinary), "a few may be off"
    assert not agrees([*wrong[:4], *ordinary[4:]], ordinary)
    assert not agrees([[0.7, 2.0, 0.2]] * 8, ordinary)
    assert not agrees([wrong[0], ordinary[0]], ordinary[:2]), "one of two"
    nowhere = [[float("nan")] * 3]
    assert agrees([*nowhere, *ordinary[1:]], [*nowhere, *ordinary[1:]])
    assert not agrees(nowhere * 8, ordinary)
    bf16 = 2**-7
    assert agrees([[0.7, 2.15, 0.1]] * 8, ordinary, bf16)
    assert not agrees([[0.7, 2.5, 0.1]] * 8, ordinary, bf16)
    known = [[1e-3, 2e-3, 1e-6]] * 8  # in bf16 the probability of its answer is 1, but for rounding
    assert agrees([[1e-3, 6e-3, 1e-6]] * 8, known, bf16)
    assert not agrees([[1e-3, 6e-3, 1e-6]] * 8, known), "float32 tells them apart"


def test_samples_that_are_compared_differ_in_length():
    found = measurer._spread(np.arange(100) * 10, 8)
    assert found.tolist()[:3] == [0, 990, 140]
    assert len(set(found.tolist())) == 8
    assert measurer._spread(np.array([4, 7, 9]), 8).tolist() == [4, 9, 7]
    assert measurer._spread(np.array([4]), 8).tolist() == [4]


def test_redundant_samples_share_their_weight(tiny_folder):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 12)
    for copy_of in (3, 7, 9):  # four samples that are one
        pool.tokens[copy_of], pool.labels[copy_of] = pool.tokens[1], pool.labels[1]
    plain = scorer(pool).score(model)
    made = scorer(pool, sampling={"redundancy": 1.0, "similarity": 0.999})
    table = made.score(model)
    group = [1, 3, 7, 9]
    assert made.neighbours.tolist() == [4 if i in group else 1 for i in range(12)]
    odds = table.probability / plain.probability
    np.testing.assert_allclose(odds[group] * 4, odds[0])
    again = scorer(pool, sampling={"redundancy": 1.0, "similarity": 0.999})
    again.load_state_dict(made.state_dict())
    assert_identical(made.score(model, refresh=True), again.score(model, refresh=True))


def test_labels_keep_their_shares_of_the_draws(tiny_folder):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 20)
    pool.labels = np.array([0] * 14 + [1] * 6)
    made = scorer(pool, sampling={"keep_fraction": 0.5, "tau": 0.1})
    made.strata = pool.labels
    made.score(model)
    chosen, weights = made.draws()
    assert np.bincount(pool.labels[chosen]).tolist() == [7, 3]
    np.testing.assert_allclose(np.bincount(pool.labels[chosen], weights), [0.7, 0.3])


def test_auto_batch_fits_the_memory_that_is_free(tiny_folder, monkeypatch):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 40)
    expected, sizes = scorer(pool, batch_size=5).score(model), []
    for free in (10**4, 10**6, 3 * 10**6, 10**12):
        monkeypatch.setattr(measurer, "free_bytes", lambda *_, free=free: free)
        made = scorer(pool, batch_size="auto")
        assert_same_tables(expected, made.score(model))
        sizes.append(made._measurer.batch_size)
    assert sizes[0] == 1
    assert sizes == sorted(sizes)
    assert 1 < sizes[-2] < sizes[-1] == 32
    assert made.state_dict()["measurer"]["batch_size"] == 32


@pytest.mark.distributed
def test_two_and_three_processes_give_the_table_of_one(tiny_folder):
    alone = {case: world_worker.tables(case, tiny_folder, World()) for case in world_worker.CASES}
    for size in (2, 3):
        worlds = run_on_ranks(world_worker.tables_of_rank, size, tiny_folder)
        for case, expected in alone.items():
            for number, table in enumerate(expected):
                found = ScoreTable.from_state_dict(worlds[0][case][number])
                assert_identical(table, found)
                for other in worlds[1:]:
                    assert_identical(found, ScoreTable.from_state_dict(other[case][number]))


@pytest.mark.distributed
def test_a_disk_that_is_full_for_one_rank_ends_all(tiny_folder):
    lora_model("bert", tiny_folder)  # written once, before the ranks read it
    ends = run_on_ranks(world_worker.ends_without_space, 2, tiny_folder, collective_timeout=20)
    assert ends[0] == ends[1]
    for fills_in in ("first", "refresh"):
        end = ends[0].index(f"{fills_in} done")
        assert end > 9, "the table alone has eight columns"
        assert all("(No space left on device)" in problem for problem in ends[0][:end])
        del ends[0][: end + 1]
