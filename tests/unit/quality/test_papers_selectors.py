"""The papers' selectors on whole pools: what they rate, what of it is in S, and what a resumed run makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference import selectors as reference
from tests.tiny import WORDS
from tests.unit.quality.sites import QUERY, ROWS, Site, make_site
from tests.worlds import run_on_ranks
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality.draws.subset import share_of
from tsqlora_scale.quality.features.last_layer import LastLayerLook
from tsqlora_scale.quality.selectors.ranked import RankedSelector, Rating
from tsqlora_scale.tasks import Task
from tsqlora_scale.tasks.rows.mixed_sets import MixedSets

BY_QUERY = ("rho", "rds", "dsir", "less")
RATED = (*BY_QUERY, "k_center", "ts_dshapley", "instruction_mining", "grad_norm", "el2n")


def assert_chosen(selector: Any, site: Site) -> None:
    """As many as were asked for, the best ones of all, and the query's rows; drawn evenly."""
    table, size = selector.table, len(site.task) - site.task.query_rows
    kept = -(-size // 2)
    assert np.isfinite(table.quality).all()
    assert table.selected[:size].sum() == kept
    assert table.selected[size:].all()
    assert table.quality[:size][table.selected[:size]].min() >= table.quality[:size][~table.selected[:size]].max()
    drawn = {int(row) for step in range(20) for row in selector.draw(step)}
    assert drawn == set(np.flatnonzero(table.selected).tolist())
    assert selector.weights(np.arange(3)) is None


@pytest.mark.parametrize("name", RATED)
def test_selectors_keep_the_best_and_go_on_as_they_were(name: str, site: Site) -> None:
    selector = site.scored(name, stratify=False)
    assert_chosen(selector, site)
    assert not selector.due(1)
    resumed = site.selector(name, stratify=False)
    resumed.load_state_dict(selector.state_dict())
    np.testing.assert_array_equal(resumed.table.quality, selector.table.quality)
    np.testing.assert_array_equal(resumed.draw(7), selector.draw(7))
    assert not resumed.due(1)


@pytest.mark.parametrize("name", ["rds", "dsir", "less", "k_center", "ts_dshapley", "instruction_mining", "grad_norm"])
def test_selectors_of_generated_texts(name: str, texts: Site) -> None:
    assert_chosen(texts.scored(name), texts)


@pytest.mark.parametrize("name", ["k_center", "ts_dshapley", "instruction_mining", "grad_norm", "el2n"])
def test_selectors_that_do_without_a_query(name: str, alone: Site) -> None:
    assert_chosen(alone.scored(name, stratify=False), alone)


def test_what_may_be_of_one_class_is_chosen_within_classes(site: Site) -> None:
    """Without being asked to: the best of every label, as many as it has of the pool; others take the best of all."""
    classes, differ = site.task.class_ids(), 0
    assert classes is not None
    for name in ("el2n", "grad_norm", "less", "rho", "rds"):
        tables = {stratify: site.scored(name, stratify=stratify).table for stratify in ("auto", True, False)}
        chosen = {stratify: table.selected.tolist() for stratify, table in tables.items()}
        assert chosen["auto"] == chosen[name != "rds"]
        differ += chosen[True] != chosen[False]
        quality, rows = tables[True].quality[:ROWS], tables[True].selected[:ROWS]
        for label, of_pool in enumerate(np.bincount(classes[:ROWS])):
            own = classes[:ROWS] == label
            assert abs(rows[own].sum() - of_pool / 2) <= 0.5
            assert quality[own & rows].min() >= quality[own & ~rows].max()
    assert differ >= 3, "or nothing is shown"
    for form in ("max", "round_robin"):
        tables = {stratify: site.scored("less", less=form, stratify=stratify).table for stratify in ("auto", False)}
        assert tables["auto"].selected.tolist() == tables[False].selected.tolist()


class OneClassFirst(RankedSelector):
    """As the hardest samples are of a model that has learned to answer with the other class alone."""

    def rate(self, module: torch.nn.Module) -> Rating:
        classes = self.pool.class_ids()
        assert classes is not None
        return Rating(classes.astype(np.float64))


@pytest.mark.parametrize("stratify", ["auto", True])
def test_a_choice_that_loses_a_class_says_so(site: Site, stratify: Any, caplog: pytest.LogCaptureFixture) -> None:
    name = f"{__name__}:OneClassFirst"
    table = site.scored(name, keep_fraction=0.25, stratify=stratify).table
    classes = site.task.class_ids()
    assert classes is not None
    lost = set(classes.tolist()) - set(classes[table.selected].tolist())
    said = f"sampling.selector={name!r}: S holds no sample of 1 of the 2 classes; set sampling.stratify=true"
    assert (said in caplog.text) == bool(lost) == (stratify == "auto")


def test_norms_against_one_sample_at_a_time(site: Site) -> None:
    table = site.scored("grad_norm").table
    for row in range(0, ROWS, 5):
        own = reference.own_gradients(site.module, site.task.losses, site.task.batch(np.array([row])))
        assert table.quality[row] == pytest.approx(float(sum(g.square().sum() for g in own)) ** 0.5, rel=1e-4)


def test_errors_against_one_sample_at_a_time(site: Site) -> None:
    table = site.scored("el2n").table
    site.module.eval()
    for row in range(0, ROWS, 5):
        batch = site.task.batch(np.array([row]))
        with torch.no_grad():
            odds = site.module(**batch.inputs).logits.softmax(-1)[0].double().numpy()
        error = odds - np.eye(2)[int(batch.targets)]
        assert table.quality[row] == pytest.approx(float(np.sqrt((error**2).sum())), abs=1e-5)


def test_rds_against_one_sample_at_a_time(site: Site) -> None:
    table = site.scored("rds").table
    look = LastLayerLook(by_position=True)
    with torch.no_grad(), site.module.disable_adapter():  # type: ignore[operator]
        site.module.eval()
        pool, query = (
            np.stack([look(site.module, rows.batch(np.array([i]))).numpy()[0] for i in range(len(rows))])
            for rows in (site.task, site.task.query)
        )
    cosines = np.array([[reference.cosine(a, b) for b in query] for a in pool])
    np.testing.assert_allclose(table.terms["nearest_query"], cosines.max(1), atol=1e-4)
    picks = reference.in_turn(cosines[:ROWS], ROWS // 2)
    assert set(np.flatnonzero(table.selected[:ROWS]).tolist()) == set(picks)


def test_shapley_values_prefer_right_answers(site: Site) -> None:
    """All of the query says yes: no row that says so is worth less than its like that says no."""
    table, ids = site.scored("ts_dshapley").table, site.task.class_ids()
    assert ids is not None
    assert table.quality[:ROWS][ids[:ROWS] == 1].mean() > table.quality[:ROWS][ids[:ROWS] == 0].mean()


def test_dsir_prefers_the_words_of_the_query(site: Site) -> None:
    selector = site.scored("dsir")
    weights = selector.table.terms["log_weight"]
    share = [np.mean([word in WORDS[:12] for word in row[0].split()]) for row in site.task.texts(np.arange(ROWS))]
    assert np.corrcoef(share, weights[:ROWS])[0, 1] > 0.5
    again = site.scored("dsir").table
    np.testing.assert_array_equal(again.quality, selector.table.quality)
    assert not np.array_equal(again.quality, weights), "drawn, not cut"


def test_rho_is_the_label_term_alone(site: Site) -> None:
    table = site.scored("rho").table
    np.testing.assert_array_equal(table.quality, table.terms["log_q"] - table.terms["log_p"])


def test_a_random_part_can_keep_the_classes_shares(site: Site) -> None:
    classes = site.task.class_ids()
    assert classes is not None
    shares = np.bincount(classes[:ROWS], minlength=2)
    differ = []
    for count in range(2, ROWS, 3):
        for stratify in (True, "auto"):
            rows = site.selector("random", stratify=stratify, keep_fraction=count / ROWS).subset()
            found = np.bincount(classes[rows[rows < ROWS]], minlength=2)
            assert found.sum() == share_of(count / ROWS, ROWS)
            differ.append(abs(found - shares * found.sum() / ROWS).max())
    assert max(differ[::2]) < 1 <= max(differ[1::2])


def test_rounds_are_drawn_anew(site: Site) -> None:
    selector = site.selector("rs2")
    assert selector.table is None
    assert not selector.due(0)
    whole = ROWS // 2 + QUERY
    drawn = np.concatenate([selector.draw(step) for step in range(2 * whole)])
    rounds = [set(drawn[i * whole : (i + 1) * whole].tolist()) for i in range(4)]
    assert all(len(members) == whole and set(range(ROWS, ROWS + QUERY)) <= members for members in rounds)
    assert len({frozenset(members) for members in rounds}) > 1
    other = site.selector("rs2", keep_fraction=0.25)
    with pytest.raises(UserError, match="count"):
        other.load_state_dict(selector.state_dict())
    site.selector("rs2").load_state_dict(selector.state_dict())


def test_what_is_known_is_skipped_without_bias(site: Site) -> None:
    """Losses of half of the samples are below the mean: an epoch has half of these, which count twice."""
    long = Site(site.tree | {"train": site.tree["train"] | {"max_steps": 10**6}}, site.task, site.module)
    selector = long.selector("infobatch", keep_fraction="auto")
    size, batch = len(site.task), site.tree["train"]["batch_size"]
    losses = np.where(np.arange(size) % 2 == 0, 0.1, 2.0)
    step, masses = 0, []
    for epoch in range(120):
        drawn: list[int] = []
        while True:
            rows = selector.draw(step)
            if selector._start == step and drawn:
                break
            drawn += rows.tolist()
            selector.listener.start_step(step, batch)
            selector.listener.start_micro_batch(batch // 2, batch // 2)
            selector.listener.end_micro_batch(torch.from_numpy(losses[rows[batch // 2 :]]), torch.ones(batch // 2))
            selector.listener.start_micro_batch(batch // 2, 0)
            selector.listener.end_micro_batch(torch.from_numpy(losses[rows[: batch // 2]]), torch.ones(batch // 2))
            selector.listener.take(rows, selector.listener.numbers(torch.zeros(1)), taken=True)
            step += 1
        if epoch == 0:
            assert set(drawn) == set(range(size)), "the first epoch skips nothing"
            continue  # the weights are those of the epoch that has begun
        kept = selector._kept
        assert kept[1::2].all()
        assert kept[ROWS:].all(), "rows of the query are never skipped"
        weights = selector.weights(np.arange(size))
        masses.append(np.where(kept, 1.0 if weights is None else weights, 0.0))
    mass = np.mean(masses, axis=0)
    np.testing.assert_allclose(mass[1::2], 1)
    assert mass[:ROWS:2].mean() == pytest.approx(1, abs=0.1)
    resumed = site.selector("infobatch", keep_fraction="auto")
    resumed.load_state_dict(selector.state_dict())
    np.testing.assert_array_equal(resumed.draw(step), selector.draw(step))
    np.testing.assert_array_equal(resumed.weights(np.arange(size)), selector.weights(np.arange(size)))


def test_the_end_of_a_run_skips_nothing(site: Site) -> None:
    selector = site.selector("infobatch", keep_fraction="auto")
    selector.listener.losses[:] = np.arange(len(site.task))
    selector._begin(1)
    assert not selector._kept.all()
    selector._begin(4)
    assert selector._kept.all()
    assert selector.weights(np.arange(3)) is None


def test_not_finite_samples_come_last(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = Task.losses

    def broken(self: Task, module: Any, batch: Any) -> torch.Tensor:
        found = losses(self, module, batch)
        return found * torch.where(torch.as_tensor(batch.indices == 4), torch.nan, 1.0)

    monkeypatch.setattr(Task, "losses", broken)
    for name in ("less", "grad_norm"):
        table = site.scored(name).table
        assert table.quality[4] == table.quality.min()
        assert not table.selected[4]


class WithWeights(RankedSelector):
    """A rating that weighs its samples, in strata of its own."""

    def rate(self, module: Any) -> Rating:
        size = len(self.pool)
        strata = (np.arange(size) % 3 == 0).astype(np.int64)  # a third
        return Rating(
            np.arange(size, dtype=np.float64),
            terms={"place": np.arange(size, dtype=np.float64)},
            shares=np.array([1.0, 1.0]),
            strata=strata,
            weights=1.0 + np.arange(size),
            findings={"found": 1},
        )


def test_ranked_quotas_and_weights(site: Site) -> None:
    name = f"{__name__}:WithWeights"
    selector = site.scored(name)
    chosen = np.flatnonzero(selector.table.selected[:ROWS])
    thirds = [row for row in chosen if row % 3 == 0]
    assert len(chosen) == 9
    assert sorted(thirds) == [3, 6, 9, 12, 15][-len(thirds) :]
    assert len(thirds) in (4, 5)
    assert selector.table.selected[ROWS:].all()
    weights = np.where(selector.table.selected, 1.0 + np.arange(ROWS + QUERY), 0)
    np.testing.assert_allclose(selector.table.probability, weights / weights.sum())
    drawn = np.bincount(np.concatenate([selector.draw(step) for step in range(600)]), minlength=ROWS + QUERY)
    np.testing.assert_allclose(drawn / drawn.sum(), weights / weights.sum(), atol=0.02)
    assert selector.findings == {"found": 1}

    even = site.scored(name, use="weight", max_weight=1.2)
    drawn = np.bincount(np.concatenate([even.draw(step) for step in range(19)]), minlength=ROWS + QUERY)
    assert drawn[even.table.selected].max() - drawn[even.table.selected].min() <= 1
    of_losses = even.weights(np.arange(ROWS + QUERY))
    share = even.table.probability * even.table.selected.sum()
    inside = even.table.selected
    np.testing.assert_allclose(of_losses[inside], np.minimum(share[inside], 1.2))
    unbiased = site.scored(name, unbiased=True, max_weight=1.5)
    drawn = np.bincount(np.concatenate([unbiased.draw(step) for step in range(600)]), minlength=ROWS + QUERY)
    np.testing.assert_allclose(drawn / drawn.sum(), weights / weights.sum(), atol=0.02)
    np.testing.assert_allclose(unbiased.weights(np.arange(ROWS + QUERY))[inside], np.minimum(1 / share[inside], 1.5))
    assert site.scored(name, unbiased=True, replacement=False).weights(np.arange(3)) is None, "each once an epoch"
    with pytest.raises(UserError, match=r"sampling\.\*"):
        site.selector(name).load_state_dict(even.state_dict())
    resumed = site.selector(name, use="weight", max_weight=1.2)
    resumed.load_state_dict(even.state_dict())
    np.testing.assert_array_equal(resumed.weights(np.arange(ROWS)), of_losses[:ROWS])


def test_a_stratum_never_has_more_places_than_samples(site: Site) -> None:
    selector = site.scored(f"{__name__}:WithWeights", keep_fraction=1.0)
    assert selector.table.selected.all()


def test_another_query_is_another_choice(site: Site, tmp_path: Path, models_dir: Path) -> None:
    state = site.scored("rds").state_dict()
    state["ranked"]["query"] = "another"
    with pytest.raises(UserError, match=r"another task\.query"):
        site.selector("rds").load_state_dict(state)


def test_quality_weighs_losses_instead_of_draws(site: Site) -> None:
    selector = site.scored("quality", keep_fraction=1.0, use="weight", stratify=False)
    size = len(site.task)
    drawn = np.concatenate([selector.draw(step) for step in range(7)])
    assert np.bincount(drawn, minlength=size).tolist() == [3] * size, "each sample once an epoch"
    np.testing.assert_allclose(
        selector.weights(np.arange(size)), np.minimum(selector.table.probability * size, 10.0), rtol=1e-9
    )


LISTS: dict[str, Callable[[Path], str]] = {
    "txt": lambda folder: _written(folder / "l.txt", "3\n\n 7 \n11\n"),
    "csv": lambda folder: _written(folder / "l.csv", "id,why\n3,x\n7,y\n11,z\n"),
    "jsonl": lambda folder: _written(folder / "l.jsonl", '{"sample_id": "3"}\n{"sample_id": 7}\n{"sample_id": "11"}\n'),
}


def _written(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_samples(kind: str, site: Site, tmp_path: Path) -> None:
    selector = site.scored("file", file=LISTS[kind](tmp_path), keep_fraction="auto")
    assert np.flatnonzero(selector.table.selected).tolist() == [3, 7, 11, *range(ROWS, ROWS + QUERY)]


def test_a_list_that_lacks_a_class_is_to_be_longer(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(site.task, "class_ids", lambda: (np.arange(len(site.task)) == 0).astype(np.int64))
    site.scored("file", file=LISTS["txt"](tmp_path), keep_fraction="auto")
    assert "no sample of 1 of the 2 classes; sampling.file lists none of them: add some" in caplog.text


def test_scores_of_a_file_and_our_own(site: Site, tmp_path: Path) -> None:
    lines = "".join(f"{row}\t{-row / 2}\n" for row in reversed(range(ROWS + 5)))  # more than the pool has
    selector = site.scored("file", file=_written(tmp_path / "s.tsv", "sample_id\tscore\n" + lines))
    assert np.flatnonzero(selector.table.selected[:ROWS]).tolist() == list(range(9))
    assert selector.table.selected[ROWS:].all()
    np.testing.assert_allclose(selector.table.quality[:ROWS], -np.arange(ROWS) / 2)
    written = selector.table.write(tmp_path / "scores", site.task.sample_ids)
    again = site.scored("file", file=str(written))
    np.testing.assert_array_equal(again.table.selected, selector.table.selected)


def ratings_of_rank(world: World, folder: Path, models: Path) -> dict[str, torch.Tensor]:
    """Ratings of every kind of pass, as they are in a world of several ranks."""
    site = make_site("bert", folder / f"rank-{world.rank}", models)
    names = ("less", "grad_norm", "el2n", "rds", "ts_dshapley", "instruction_mining", "dsir")
    return {name: torch.from_numpy(site.scored(name, world).table.quality) for name in names}


@pytest.mark.slow
@pytest.mark.distributed
def test_ratings_are_equal_on_two_ranks(site: Site, tmp_path: Path, models_dir: Path) -> None:
    first, second = run_on_ranks(ratings_of_rank, 2, tmp_path, models_dir)
    for name, ratings in first.items():
        torch.testing.assert_close(ratings, second[name], rtol=0, atol=0)
        torch.testing.assert_close(ratings, torch.from_numpy(site.scored(name).table.quality), rtol=0, atol=0)


def test_skipping_leaves_the_sets_of_a_mixture_their_shares(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of one set is known by now: half of it is skipped, and the other half counts twice."""
    size = len(site.task)
    numbers = np.array([i % 2 for i in range(size)], dtype=np.int16)
    sets = MixedSets(("known", "new"), numbers, np.array([0.5, 0.5]))
    weights = np.where(numbers == 0, 0.5 / (numbers == 0).sum(), 0.5 / (numbers == 1).sum())
    monkeypatch.setattr(site.task, "sets", sets, raising=False)
    monkeypatch.setattr(site.task, "draw_weights", lambda: weights.copy())
    long = Site(site.tree | {"train": site.tree["train"] | {"max_steps": 10**6}}, site.task, site.module)
    selector = long.selector("infobatch", keep_fraction="auto")
    selector.listener.losses[:] = np.where(numbers == 0, 0.1, 2.0)
    shares = []
    for step in range(1, 200):
        selector._begin(step)
        drawn = np.zeros(size)
        drawn[selector._kept] = selector._sampler.weights / selector._sampler.weights.sum()
        mass = drawn * selector.weights(np.arange(size))
        shares.append(mass[numbers == 0].sum() / mass.sum())
    assert np.mean(shares) == pytest.approx(0.5, abs=0.02)
