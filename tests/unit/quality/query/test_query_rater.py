"""A pool rated by a query: against its parts one by one, in two passes, killed, on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.quality.query.texts import Killed, Wanted
from tests.unit.quality.toys import lora_model
from tests.worlds import run_on_ranks
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import ScoringConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality.features.forward_pass import ForwardPass
from tsqlora_scale.quality.query import query_rater, row_rating
from tsqlora_scale.quality.query.looks import FeatureLook
from tsqlora_scale.quality.query.query_rater import QueryRater, QueryRating
from tsqlora_scale.quality.query.row_rating import RowRating


def rated(model: nn.Module, pool: Wanted, world: World | None = None, **given: Any) -> QueryRating:
    scoring = ScoringConfig(batch_size=4, shard_size=8)
    return QueryRater(scoring, pool=pool, world=world or World(), seed=0, **given).rate(model)


def mixed(size: int, **given: Any) -> Wanted:
    """A third of it is as the query is: both looks are taken."""
    return Wanted("bert", size, queried=36, every=3, **given)


def same(one: QueryRating, other: QueryRating, atol: float = 0.0) -> None:
    np.testing.assert_allclose(one.log_ratio, other.log_ratio, atol=atol, rtol=0)
    np.testing.assert_allclose(one.wanted, other.wanted, atol=atol, rtol=0)
    assert list(one.terms) == list(other.terms)
    assert vars(one.standing) == pytest.approx(vars(other.standing), abs=atol)
    assert one.coefficients == pytest.approx(other.coefficients, abs=atol)
    for ours, theirs in zip(one.agrees or (), other.agrees or (), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def looked_at(model: nn.Module, pool: Wanted, size: int) -> tuple[FeatureLook, np.ndarray, np.ndarray]:
    """The pool's rows and the query's, one at a time."""
    assert pool.query is not None
    look, alone = FeatureLook(pool, seed=0), ForwardPass(model, World(), batch_size=1)
    wanted = alone.run(pool.query, np.arange(len(pool.query)), look, name="x")
    return look, alone.run(pool, np.arange(size), look, name="x"), wanted


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("kind", ["bert", "mixed", "bart", "gpt2"])
def test_a_rating_is_that_of_rows_alone(kind: str, joins: bool, models_dir: Path) -> None:
    is_mixed = kind == "mixed"
    model = lora_model("bert" if is_mixed else kind, models_dir)
    pool = mixed(30, joins=joins) if is_mixed else Wanted(kind, 30, joins=joins)
    found = rated(model, pool)
    look, numbers, wanted = looked_at(model, pool, 30)
    assert look.shape is not None
    alone = RowRating.fit(look.shape, numbers, wanted, seed=0)
    everything = np.concatenate([alone.of_pool, alone.of_query]) if joins else alone.of_pool
    assert len(found.log_ratio) == len(pool)
    np.testing.assert_allclose(found.log_ratio, alone.log_ratio(everything), atol=2e-2)
    np.testing.assert_allclose(found.wanted, alone.wanted(everything), atol=1e-2)
    assert list(found.terms) == list(alone.names)
    for place, name in enumerate(alone.names):
        np.testing.assert_allclose(found.terms[name], everything[:, place], atol=5e-3)
    assert list(found.coefficients) == list(alone.terms.names)
    assert vars(found.standing) == pytest.approx(vars(alone.standing), abs=1e-2)
    assert found.standing.by_mixture == is_mixed
    assert (found.agrees is None) == (alone.mixture is None)
    if found.agrees is not None:
        expected, asked = alone.agrees(everything), alone.agrees(alone.of_query)
        assert expected is not None and asked is not None
        unsure = np.abs(everything[:, -1]) < 1e-3
        np.testing.assert_array_equal(found.agrees[0][~unsure], expected[~unsure])
        assert found.agrees[1].shape == asked.shape
    if is_mixed:
        assert 0.05 < found.standing.share < 0.95
        assert found.wanted[:30:3].mean() > 2 * found.wanted[1:30:3].mean(), "the query's words are found"


@pytest.mark.parametrize("kind", ["bert", "mixed", "bart"])
def test_a_large_pool_is_fitted_to_a_part(kind: str, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the rest is rated by what no model has seen."""
    monkeypatch.setattr(query_rater, "FITTED", 25)
    model = lora_model("bert" if kind == "mixed" else kind, models_dir)
    pool = mixed(40) if kind == "mixed" else Wanted(kind, 40)
    found = rated(model, pool)
    fitted = QueryRater(ScoringConfig(), pool=pool, world=World(), seed=0)._fitted(40)
    rest = np.setdiff1d(np.arange(40), fitted)
    assert (len(fitted), len(rest)) == (25, 15)
    assert (np.diff(fitted) > 1).any(), "at random"
    look, numbers, wanted = looked_at(model, pool, 40)
    assert look.shape is not None
    alone = RowRating.fit(look.shape, numbers[fitted], wanted, seed=0)
    assert (alone.mixture is not None) == (kind == "mixed")
    of_rest = alone.values(numbers[rest].astype(np.float64))
    assert list(found.terms) == list(alone.names)
    for place, name in enumerate(alone.names):
        np.testing.assert_allclose(found.terms[name][fitted], alone.of_pool[:, place], atol=5e-3)
        np.testing.assert_allclose(found.terms[name][rest], of_rest[:, place], atol=5e-3)
    np.testing.assert_allclose(found.log_ratio[rest], alone.log_ratio(of_rest), atol=2e-2)
    np.testing.assert_allclose(found.wanted[rest], alone.wanted(of_rest), atol=1e-2)


@pytest.mark.parametrize("fitted", [100, 25])
def test_copies_are_known_by_their_texts(fitted: int, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one another, and of the query's rows."""
    monkeypatch.setattr(query_rater, "FITTED", fitted)
    model, pool = lora_model("bert", models_dir), mixed(40)
    assert pool.query is not None
    for place, source in ((7, 1), (20, 1), (33, 6)):
        pool.tokens[place] = pool.tokens[source]
    pool.tokens[12], pool.labels[12] = pool.query.tokens[3], pool.query.labels[3]
    rows = QueryRater(ScoringConfig(), pool=pool, world=World(), seed=0)._fitted(40)
    look, numbers, wanted = looked_at(model, pool, 40)
    assert look.shape is not None
    copies = np.arange(40 + len(wanted))
    copies[[7, 20]], copies[33], copies[12] = 1, 6, 43
    known = copies[np.concatenate([rows, 40 + np.arange(len(wanted))])]
    alone = RowRating.fit(look.shape, numbers[rows], wanted, copies=known, seed=0)
    other = RowRating.fit(look.shape, numbers[rows], wanted, seed=0)
    found = rated(model, pool)
    for place, name in enumerate(alone.names):
        np.testing.assert_allclose(found.terms[name][rows], alone.of_pool[:, place], atol=5e-3)
    assert np.abs(other.of_pool[:, 1:3] - alone.of_pool[:, 1:3]).max() > 2e-2


def test_a_copy_outside_the_fitted_part_is_rated_as_the_one_in_it(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_rater, "FITTED", 25)
    model, pool = lora_model("bert", models_dir), mixed(40)
    fitted = QueryRater(ScoringConfig(), pool=pool, world=World(), seed=0)._fitted(40)
    (same, other, *_), (source, *_) = np.setdiff1d(np.arange(40), fitted).tolist(), fitted.tolist()
    for place, label in ((same, pool.labels[source]), (other, 1 - pool.labels[source])):
        pool.tokens[place], pool.labels[place] = pool.tokens[source], label
    found = rated(model, pool)
    for name, values in found.terms.items():
        assert values[same] == values[source]
        if name != "text_term":
            assert values[other] != values[source]


def test_a_copy_is_known_by_what_the_model_makes_of_it(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the fitted part, a text in capitals of which the model makes the same, and one of which it does not."""
    monkeypatch.setattr(query_rater, "FITTED", 25)
    model, pool = lora_model("bert", models_dir), mixed(40)
    fitted = QueryRater(ScoringConfig(), pool=pool, world=World(), seed=0)._fitted(40)
    (same, other, *_), (source, *_) = np.setdiff1d(np.arange(40), fitted).tolist(), fitted.tolist()
    pool.tokens[same], pool.labels[same], pool.labels[other] = pool.tokens[source], *[pool.labels[source]] * 2
    ((text,),) = pool.texts(np.array([source]))
    written = {same: f" {text} ", other: text.replace(" ", "  ")}
    texts = pool.texts
    monkeypatch.setattr(pool, "texts", lambda rows: [(written.get(int(row), texts([row])[0][0]),) for row in rows])
    found = rated(model, pool)
    assert all(values[same] == values[source] for values in found.terms.values())
    assert found.terms["text_term"][other] != found.terms["text_term"][source]


def test_a_class_outside_the_fitted_part_is_rated(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_rater, "FITTED", 20)
    model, pool = lora_model("bert", models_dir), Wanted("bert", 30)
    rater = QueryRater(ScoringConfig(), pool=pool, world=World(), seed=0)
    (outside, *_) = sorted(set(range(30)) - set(rater._fitted(30).tolist()))
    pool.labels[outside] = 3
    assert np.isfinite(rater.rate(model).log_ratio).all()


@pytest.mark.parametrize("fitted", [100, 20])
@pytest.mark.parametrize("point", ["first look", "standing", "second look", "rest"])
def test_a_rating_that_is_killed_goes_on(
    fitted: int, point: str, models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all features are kept, and none is looked at again."""
    monkeypatch.setattr(query_rater, "FITTED", fitted)
    model, pool = lora_model("bert", models_dir), mixed(30)
    wanted = rated(model, pool, folder=tmp_path / "whole")
    assert wanted.standing.by_mixture and 0.05 < wanted.standing.share < 0.95
    assert not (tmp_path / "whole").exists(), "nothing is left of a pass that has ended"
    place, name = {
        "first look": (row_rating, "fit_terms"),
        "standing": (row_rating, "stand"),
        "second look": (row_rating.Mixture, "fit"),
        "rest": (query_rater, "_TermLook"),
    }[point]

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(place, name, killed)
        if point == "rest" and fitted == 100:
            rated(model, pool, folder=tmp_path / "parts")
            return
        with pytest.raises(Killed):
            rated(model, pool, folder=tmp_path / "parts")
    assert list((tmp_path / "parts").iterdir())
    same(rated(model, pool, folder=tmp_path / "parts"), wanted)
    assert not (tmp_path / "parts").exists()


def test_hidden_states_that_are_not_finite_are_a_mistake(models_dir: Path) -> None:
    model, pool = lora_model("bert", models_dir), Wanted("bert", 20)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "LayerNorm" in name).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite") as raised:
        rated(model, pool)
    assert "model.dtype" in str(raised.value)


def of_world(world: World, folder: Path, fitted: int, copied: bool) -> QueryRating:
    query_rater.FITTED = fitted
    return rated(lora_model("bert", folder), with_copies() if copied else mixed(31), world)


def with_copies() -> Wanted:
    """Of rows with their answers, of rows without, and of a row of the query's."""
    pool = mixed(31)
    assert pool.query is not None
    for place, source in zip(range(16, 30), [*range(7), *range(7)], strict=True):
        pool.tokens[place] = pool.tokens[source]
        pool.labels[place] = pool.labels[source] if place < 26 else 1 - pool.labels[source]
    pool.tokens[30], pool.labels[30] = pool.query.tokens[3], pool.query.labels[3]
    return pool


@pytest.mark.parametrize(("ranks", "copied"), [(2, False), (3, False), (3, True)])
def test_ranks_rate_alike(ranks: int, copied: bool, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both looks, and rows beyond those that these have seen."""
    monkeypatch.setattr(query_rater, "FITTED", 20)
    alone = rated(lora_model("bert", models_dir), with_copies() if copied else mixed(31))
    if not copied:
        assert alone.standing.by_mixture and 0.05 < alone.standing.share < 0.95
    for found in run_on_ranks(of_world, ranks, models_dir, 20, copied):
        same(found, alone)
