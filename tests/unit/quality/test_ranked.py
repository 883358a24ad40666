"""What a rating makes of S and the draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.runs import run_tree
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality.selectors.ranked import RankedSelector, Rating, quota_of
from tsqlora_scale.quality.selectors.selector import SelectorContext


@st.composite
def strata(draw: Any) -> tuple[np.ndarray, int, np.ndarray]:
    sizes = np.array(draw(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)))
    total = draw(st.integers(0, int(sizes.sum())))
    shares = np.array(draw(st.lists(st.integers(0, 9).map(float), min_size=len(sizes), max_size=len(sizes))))
    return sizes, total, shares


@given(given=strata())
def test_places_are_given_by_shares(given: tuple[np.ndarray, int, np.ndarray]) -> None:
    sizes, total, shares = given
    places = quota_of(sizes, total, shares)
    assert places.sum() == total
    assert (places >= 0).all()
    assert (places <= sizes).all()
    if (places[shares == 0] > 0).any():
        assert (places == sizes)[shares > 0].all(), "without a share, only what the others cannot take"
    if shares.sum():
        exact = total * shares / shares.sum()
        if (np.ceil(exact) <= sizes).all():
            assert (np.abs(places - exact) < 1 + 1e-9).all()


@given(given=strata())
def test_without_shares_places_are_as_the_sizes(given: tuple[np.ndarray, int, np.ndarray]) -> None:
    sizes, total, _ = given
    places = quota_of(sizes, total, None)
    assert places.sum() == total
    assert (np.abs(places - total * sizes / max(sizes.sum(), 1)) < 1 + 1e-9).all()


class Rows:
    """A pool of two classes, with the query's rows at its end."""

    def __init__(self, classes: list[int], joined: int = 0) -> None:
        self.classes, self.query_rows, self.query = np.array(classes, dtype=np.int32), joined, None

    def __len__(self) -> int:
        return len(self.classes)

    def strata(self) -> np.ndarray:
        return self.classes

    class_ids = strata

    def draw_weights(self) -> np.ndarray | None:
        return None

    def digest(self) -> str:
        return "rows"


class Given(RankedSelector):
    """Rated as the module that it is given says."""

    def rate(self, module: nn.Module) -> Rating:
        assert isinstance(module, Told)
        return module.rating


class Told(nn.Module):
    """A rating, where a model is expected."""

    def __init__(self, rating: Rating) -> None:
        super().__init__()
        self.rating = rating


def chosen(pool: Rows, rating: Rating, folder: Path, models: Path, **sampling: Any) -> Given:
    tree = run_tree("bert", folder, models, "run")
    tree["sampling"] = sampling
    context = SelectorContext(
        config=parse_config(tree), pool=pool, theta=lambda *_, **__: {}, world=World(), scoring_step=0
    )
    selector = Given(context)
    assert selector.due(0)
    selector.score(Told(rating), 0)
    assert not selector.due(1)
    return selector


def members(selector: Given) -> list[int]:
    assert selector.table is not None
    return np.flatnonzero(selector.table.selected).tolist()


QUALITY = np.array([0.1, 0.9, 0.3, 0.8, 0.2, 0.7, -5.0, -6.0])


def test_the_best_and_the_querys_rows_are_kept(tmp_path: Path, models_dir: Path) -> None:
    pool = Rows([0] * 8, joined=2)
    assert members(chosen(pool, Rating(QUALITY), tmp_path, models_dir, keep_fraction=0.5)) == [1, 3, 5, 6, 7]
    assert members(chosen(pool, Rating(QUALITY), tmp_path, models_dir)) == list(range(8)), "auto, and nothing was said"
    found = chosen(pool, Rating(QUALITY, keep=1, findings={"a": 1}), tmp_path, models_dir)
    assert members(found) == [1, 6, 7]
    assert found.findings == {"a": 1}
    drawn = np.concatenate([found.draw(step) for step in range(20)])
    assert set(drawn.tolist()) == {1, 6, 7}
    assert np.bincount(drawn)[[1, 6, 7]].std() < 1, "evenly, without replacement"


def test_strata(tmp_path: Path, models_dir: Path) -> None:
    pool = Rows([0, 0, 0, 0, 1, 1, 0, 1], joined=2)
    plain = chosen(pool, Rating(QUALITY), tmp_path, models_dir, keep_fraction=0.5)
    assert members(plain) == [1, 3, 5, 6, 7]
    even = chosen(pool, Rating(QUALITY), tmp_path, models_dir, keep_fraction=0.5, stratify=True)
    assert members(even) == [1, 3, 5, 6, 7], "two of the four, one of the two"
    ours = chosen(pool, Rating(QUALITY, shares=np.array([1.0, 2.0])), tmp_path, models_dir, keep_fraction=0.5)
    assert members(ours) == [1, 4, 5, 6, 7]
    own = Rating(QUALITY, shares=np.array([0.0, 1.0]), strata=np.array([1, 0, 1, 0, 1, 0, 0, 0]))
    assert members(chosen(pool, own, tmp_path, models_dir, keep_fraction=0.5)) == [0, 2, 4, 6, 7]


def test_weights_are_drawn_by(tmp_path: Path, models_dir: Path) -> None:
    weights = np.array([1.0, 3.0, 1, 1, 1, 1, 1, 1])
    found = chosen(Rows([0] * 8), Rating(QUALITY, weights=weights), tmp_path, models_dir, keep_fraction=0.25)
    assert found.table is not None
    np.testing.assert_allclose(found.table.probability, [0, 0.75, 0, 0.25, 0, 0, 0, 0])
    drawn = np.bincount(np.concatenate([found.draw(step) for step in range(60)]), minlength=8)
    assert drawn[1] / drawn.sum() == pytest.approx(0.75, abs=0.08)


def test_a_rating_that_is_not_finite_is_refused(tmp_path: Path, models_dir: Path) -> None:
    quality = QUALITY.copy()
    quality[3] = np.nan
    with pytest.raises(UserError, match="not finite"):
        chosen(Rows([0] * 8), Rating(quality), tmp_path, models_dir)


def test_a_choice_comes_back(tmp_path: Path, models_dir: Path) -> None:
    terms = {"likeness": QUALITY * 2}
    first = chosen(Rows([0] * 8), Rating(QUALITY, keep=3, terms=terms, findings={"b": [1]}), tmp_path, models_dir)
    again = Given(first.context)
    again.load_state_dict(first.state_dict())
    assert members(again) == members(first)
    assert again.findings == first.findings
    assert again.table is not None
    np.testing.assert_array_equal(again.table.terms["likeness"], terms["likeness"])
    assert all((again.draw(step) == first.draw(step)).all() for step in range(5))
    assert not again.due(3)
    before = Given(first.context)
    before.load_state_dict(Given(first.context).state_dict())
    assert before.table is None
    assert before.due(0)


def test_another_query_is_refused(tmp_path: Path, models_dir: Path) -> None:
    first = chosen(Rows([0] * 8), Rating(QUALITY), tmp_path, models_dir)
    state = first.state_dict()
    state["ranked"]["query"] = "another"
    with pytest.raises(UserError, match=r"task\.query"):
        Given(first.context).load_state_dict(state)
