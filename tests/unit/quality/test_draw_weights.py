"""The pool's own weights multiply how often a sample is drawn, by every selector."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.unit.config_trees import tree
from tests.unit.quality.toys import RandomPool
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality.scores.score_table import ScoreTable
from tsqlora_scale.quality.selectors.by_quality import QualitySelector
from tsqlora_scale.quality.selectors.full import FullSelector
from tsqlora_scale.quality.selectors.random_subset import RandomSelector
from tsqlora_scale.quality.selectors.selector import SelectorContext
from tsqlora_scale.tasks.rows.mixed_sets import MixedSets

SIZE, STEPS, BATCH = 8, 400, 50
WEIGHTS = np.array([1.0, 2.0, 4.0, 1.0, 1.0, 0.5, 1.0, 8.0])


class WeightedPool(RandomPool):
    weights: np.ndarray | None = WEIGHTS
    sets: MixedSets | None = None

    def draw_weights(self) -> np.ndarray | None:
        return self.weights


def context(weights: np.ndarray | None = WEIGHTS, sets: MixedSets | None = None, **sampling: Any) -> SelectorContext:
    pool = WeightedPool("bert", SIZE)
    pool.weights, pool.sets = weights, sets
    config = parse_config(tree(sampling=sampling, train={"max_steps": STEPS, "batch_size": BATCH}))
    return SelectorContext(config=config, pool=pool, theta=lambda *_: {}, world=World.current(), scoring_step=0)


def counts(selector: FullSelector, steps: int = STEPS) -> np.ndarray:
    return np.bincount(np.concatenate([selector.draw(step) for step in range(steps)]), minlength=SIZE)


def assert_drawn_by(found: np.ndarray, probabilities: np.ndarray) -> None:
    expected = found.sum() * probabilities / probabilities.sum()
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max())


def scored(selector: QualitySelector, probability: np.ndarray) -> QualitySelector:
    """A selector after a pass that has given these probabilities."""
    table = ScoreTable.empty(SIZE)
    table.probability[:] = probability
    table.selected[:] = True
    table.selected[0] = False
    selector.adopt(table, 0)
    return selector


def test_even_draws() -> None:
    assert_drawn_by(counts(FullSelector(context(selector="full"))), WEIGHTS)


def test_draws_from_a_part() -> None:
    selector = RandomSelector(context(selector="random", keep_fraction=0.5))
    member = np.zeros(SIZE)
    member[selector.subset()] = 1
    assert member.sum() == 4
    assert_drawn_by(counts(selector), WEIGHTS * member)


def test_draws_by_quality() -> None:
    quality = np.array([1, 1, 2, 3, 4, 5, 6, 1]) / 23
    selector = scored(QualitySelector(context(stratify=False)), quality)
    inside = np.array([0, 1, 1, 1, 1, 1, 1, 1])
    assert_drawn_by(counts(selector), quality * WEIGHTS * inside)


def test_the_warm_up_before_scores() -> None:
    assert_drawn_by(counts(QualitySelector(context())), WEIGHTS)


def test_an_unbiased_objective_is_the_weighted_mean() -> None:
    """Draws by p w with losses weighed by 1 / p: of every sample as much as its weight says."""
    quality = np.array([1, 1, 2, 3, 4, 5, 6, 1]) / 23
    selector = scored(QualitySelector(context(stratify=False, unbiased=True)), quality)
    share = np.zeros(SIZE)
    for step in range(STEPS):
        rows = selector.draw(step)
        weights = selector.weights(rows)
        assert weights is not None
        np.add.at(share, rows, weights)
    expected = WEIGHTS * np.array([0, 1, 1, 1, 1, 1, 1, 1])
    assert share / share.sum() == pytest.approx(expected / expected.sum(), abs=0.02)


@pytest.mark.parametrize("unbiased", [False, True])
def test_sets_keep_their_shares_whatever_is_in_s(unbiased: bool) -> None:
    """Of the draws, or, where losses are weighed by 1 / p, of the objective, in which the rows' weights decide."""
    sets = MixedSets(("one", "other"), np.array([0, 0, 0, 0, 0, 1, 1, 1], dtype=np.int16), np.array([0.25, 0.75]))
    quality = np.array([1, 1, 2, 3, 4, 5, 6, 1]) / 23
    selector = scored(QualitySelector(context(sets=sets, stratify=False, unbiased=unbiased)), quality)
    share = np.zeros(SIZE)
    for step in range(STEPS):
        rows = selector.draw(step)
        weights = selector.weights(rows)
        np.add.at(share, rows, 1.0 if weights is None else weights)
    within = WEIGHTS * (1.0 if unbiased else quality) * np.array([0, 1, 1, 1, 1, 1, 1, 1])
    within[:5] *= 0.25 / within[:5].sum()
    within[5:] *= 0.75 / within[5:].sum()
    assert share / share.sum() == pytest.approx(within, abs=0.02)


def test_without_replacement_each_once_an_epoch_heavy_ones_early() -> None:
    selector = FullSelector(context(np.array([1.0] * 7 + [1000.0]), selector="full", replacement=False))
    drawn = np.concatenate([selector.draw(step) for step in range(SIZE)]).reshape(BATCH, SIZE)
    assert (np.sort(drawn, axis=1) == np.arange(SIZE)).all()
    assert (drawn[:, 0] == SIZE - 1).mean() > 0.9


def test_equal_weights_change_nothing_but_replacement() -> None:
    """And no weights nothing at all."""
    plain = FullSelector(context(None, selector="full"))
    assert (counts(plain, SIZE) == BATCH).all()
    scale = [counts(FullSelector(context(np.full(SIZE, value), selector="full"))) for value in (1.0, 0.25)]
    assert (scale[0] == scale[1]).all()


def test_other_weights_are_other_draws_to_a_resumed_run() -> None:
    from tsqlora_scale.common.errors import UserError

    state = FullSelector(context(selector="full")).state_dict()
    FullSelector(context(selector="full")).load_state_dict(state)
    with pytest.raises(UserError, match="other samples or other weights"):
        FullSelector(context(WEIGHTS * np.arange(1, 9), selector="full")).load_state_dict(state)


def objective(selector: FullSelector) -> np.ndarray:
    """Shares of the samples in what is trained: draws times the weights of losses."""
    share = np.zeros(SIZE)
    for step in range(STEPS):
        rows = selector.draw(step)
        weights = selector.weights(rows)
        np.add.at(share, rows, 1.0 if weights is None else weights)
    return share / share.sum()


def test_sets_keep_their_shares_where_losses_are_weighed_by_p() -> None:
    sets = MixedSets(("one", "other"), np.array([0, 0, 0, 0, 0, 1, 1, 1], dtype=np.int16), np.array([0.25, 0.75]))
    quality = np.array([1, 1, 2, 3, 4, 5, 6, 1]) / 23
    drawn, weighed = (
        objective(scored(QualitySelector(context(sets=sets, stratify=False, use=use, max_weight=1e6)), quality))
        for use in ("draw", "weight")
    )
    assert weighed == pytest.approx(drawn, abs=0.02)
    assert weighed[:5].sum() == pytest.approx(0.25, abs=0.02)


def test_unbiased_without_replacement_is_even_also_in_an_epoch_that_is_cut_short() -> None:
    quality = np.array([1, 1, 2, 3, 4, 5, 6, 60]) / 82
    heavy = []
    for seed in range(200):
        given = context(None, stratify=False, unbiased=True, replacement=False)
        given = dataclasses.replace(given, config=given.config.model_copy(
            update={"run": given.config.run.model_copy(update={"seed": seed}),
                    "train": given.config.train.model_copy(update={"batch_size": 2})}))  # fmt: skip
        heavy.append(7 in scored(QualitySelector(given), quality).draw(0))
    assert 0.2 < np.mean(heavy) < 0.37, "two of seven"
