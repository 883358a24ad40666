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
from tsqlora_scale.quality.query import query_rater
from tsqlora_scale.quality.query.density_ratio import DensityRatio, held_out_separation, wanted_share
from tsqlora_scale.quality.query.looks import FeatureLook
from tsqlora_scale.quality.query.query_rater import QueryRater, QueryRating
from tsqlora_scale.quality.query.terms import fit_terms


def rated(model: nn.Module, pool: Wanted, world: World | None = None, **given: Any) -> QueryRating:
    scoring = ScoringConfig(batch_size=4, shard_size=8)
    return QueryRater(scoring, pool=pool, world=world or World(), seed=0, **given).rate(model)


def same(one: QueryRating, other: QueryRating, atol: float = 0.0) -> None:
    np.testing.assert_allclose(one.log_ratio, other.log_ratio, atol=atol, rtol=0)
    assert (one.standing.share, one.standing.most, one.standing.area, one.standing.evidence) == pytest.approx(
        (other.standing.share, other.standing.most, other.standing.area, other.standing.evidence), abs=atol
    )


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("kind", ["bert", "bart", "gpt2"])
def test_a_rating_is_made_of_its_parts(kind: str, joins: bool, models_dir: Path) -> None:
    model, pool = lora_model(kind, models_dir), Wanted(kind, 30, joins=joins)
    found = rated(model, pool)
    assert pool.query is not None
    look = FeatureLook(pool, seed=0)
    alone = ForwardPass(model, World(), batch_size=1)
    wanted = alone.run(pool.query, np.arange(12), look, name="x")
    numbers = alone.run(pool, np.arange(30), look, name="x")
    assert look.shape is not None
    terms, of_pool, of_query = fit_terms(look.shape, numbers, wanted, seed=0)
    ratio = DensityRatio.fit(of_pool, of_query, rising=terms.rising)
    everything = np.concatenate([of_pool, of_query]) if joins else of_pool
    np.testing.assert_allclose(found.log_ratio, ratio.log_ratio(everything), atol=2e-2)
    for place, name in enumerate(terms.names):
        np.testing.assert_allclose(found.terms[name], everything[:, place], atol=1e-3)
    assert len(found.log_ratio) == len(pool)
    area, evidence = held_out_separation(of_pool, of_query, rising=terms.rising, seed=0)
    assert (found.standing.area, found.standing.evidence) == pytest.approx((area, evidence), abs=0.1)
    share, _ = wanted_share(ratio.log_ratio(of_pool), ratio.log_ratio(of_query))
    assert found.standing.share == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize("kind", ["bert", "bart"])
def test_a_large_pool_is_fitted_to_a_part(kind: str, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_rater, "FITTED", 25)
    model, pool = lora_model(kind, models_dir), Wanted(kind, 40)
    found = rated(model, pool)
    assert pool.query is not None
    fitted = QueryRater(ScoringConfig(), pool=pool, world=World(), seed=0)._fitted(40)
    rest = np.setdiff1d(np.arange(40), fitted)
    assert (len(fitted), len(rest)) == (25, 15)
    assert (np.diff(fitted) > 1).any(), "at random"
    look, alone = FeatureLook(pool, seed=0), ForwardPass(model, World(), batch_size=1)
    wanted = alone.run(pool.query, np.arange(12), look, name="x")
    numbers = alone.run(pool, np.arange(40), look, name="x")
    assert look.shape is not None
    terms, of_part, _ = fit_terms(look.shape, numbers[fitted], wanted, seed=0)
    of_rest = terms.values(*look.shape.split(numbers[rest].astype(np.float64)))
    for place, name in enumerate(terms.names):
        np.testing.assert_allclose(found.terms[name][fitted], of_part[:, place], atol=1e-3)
        np.testing.assert_allclose(found.terms[name][rest], of_rest[:, place], atol=1e-3)


def test_a_class_outside_the_fitted_part_is_rated(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_rater, "FITTED", 20)
    model, pool = lora_model("bert", models_dir), Wanted("bert", 30)
    rater = QueryRater(ScoringConfig(), pool=pool, world=World(), seed=0)
    (outside, *_) = sorted(set(range(30)) - set(rater._fitted(30).tolist()))
    pool.labels[outside] = 3
    assert np.isfinite(rater.rate(model).log_ratio).all()


@pytest.mark.parametrize("fitted", [100, 20])
@pytest.mark.parametrize("point", ["fit", "ratio", "rest"])
def test_a_rating_that_is_killed_goes_on(
    fitted: int, point: str, models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all features are kept, and none is looked at again."""
    monkeypatch.setattr(query_rater, "FITTED", fitted)
    model, pool = lora_model("bert", models_dir), Wanted("bert", 30)
    wanted = rated(model, pool, folder=tmp_path / "whole")
    assert not (tmp_path / "whole").exists(), "nothing is left of a pass that has ended"
    name = {"fit": "fit_terms", "ratio": "stand", "rest": "_TermLook"}[point]

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(query_rater, name, killed)
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


def of_world(world: World, folder: Path, fitted: int) -> QueryRating:
    query_rater.FITTED = fitted
    return rated(lora_model("bert", folder), Wanted("bert", 31), world)


def test_ranks_rate_alike(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_rater, "FITTED", 20)
    alone = rated(lora_model("bert", models_dir), Wanted("bert", 31))
    one, two = run_on_ranks(of_world, 2, models_dir, 20)
    same(one, two)
    same(one, alone)
