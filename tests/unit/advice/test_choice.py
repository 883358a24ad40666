"""What would be chosen, and the shares of a pool, where the truth is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.advice import spare_share
from tsqlora_scale.advice.pool_shares import off_target, redundant, wrong_labels
from tsqlora_scale.advice.query_choice import PoolRatio, chosen_weights
from tsqlora_scale.config.quality_sections import SamplingConfig
from tsqlora_scale.quality.query.choice_rule import surer_part
from tsqlora_scale.quality.query.density_ratio import Standing, wanted_share
from tsqlora_scale.quality.query.looks import Shape


def ratio_of(
    share: float, *, rows: int = 1000, queried: int = 64, evidence: float = 9.0, seed: int = 0, by_mixture: bool = False
) -> PoolRatio:
    """Log ratios of a pool of which ``share`` is as the query is, the rest far off; of every two rows that are wanted
    the pool expects one's answer, of the others all."""
    generator = np.random.default_rng(seed)
    wanted = round(share * rows)
    pool = np.concatenate([generator.normal(2, 1, wanted), generator.normal(-4, 1, rows - wanted)])
    query = generator.normal(2, 1, queried)
    found, most = wanted_share(pool, query)
    standing = Standing(found, most, 0.9, evidence, by_mixture)
    agrees = (np.arange(rows) % 2 == 0) | (np.arange(rows) >= wanted), np.arange(queried) % 2 == 0
    likely = np.minimum(1.0, found * np.exp(pool))
    return PoolRatio(pool, query, standing, likely, agrees if by_mixture else None)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_planted_share_lies_within_its_interval(share: float) -> None:
    found = off_target(ratio_of(share), seed=0)
    assert found.low <= 1 - share <= found.high
    assert found.low <= found.share <= found.high
    assert abs(found.share - (1 - share)) < 0.2
    assert "guess" in off_target(ratio_of(share, evidence=1.0), seed=0).note


def test_without_evidence_nothing_is_left_out() -> None:
    assert (chosen_weights(ratio_of(0.3, evidence=2.0), SamplingConfig(), size=1000) == 1).all()


def test_the_surer_part_is_chosen_in_the_classes_shares() -> None:
    ratio = ratio_of(0.3)
    labels, wanted = np.arange(1000) % 2, np.array([0] * 16 + [1] * 48)
    weights = chosen_weights(ratio, SamplingConfig(), size=1000, labels=labels, wanted=wanted)
    kept = weights > 0
    count = round(surer_part(ratio.standing.share) * 1000)
    assert kept.sum() == count
    prior = 2 * ratio.wanted[labels == 0].sum() / ratio.wanted.sum()
    assert abs(kept[labels == 0].sum() - count * (16 + prior) / 66) <= 1
    assert weights.max() <= 1
    even = chosen_weights(ratio, SamplingConfig(soft=False), size=1000)
    assert set(even) == {0.0, 1.0}
    assert even[np.argsort(-ratio.of_pool)[:count]].all()


def test_half_as_many_again_are_chosen_by_a_second_look() -> None:
    """In the query's shares of classes and of what the pool expects there; drawn by the probability of being wanted."""
    ratio = ratio_of(0.3, by_mixture=True)
    assert ratio.agrees is not None
    labels, wanted = np.arange(1000) // 2 % 2, np.array([0] * 16 + [1] * 48)
    count = round(1.5 * ratio.standing.share * 1000)
    weights = chosen_weights(ratio, SamplingConfig(), size=1000, labels=labels, wanted=wanted)
    kept = weights > 0
    assert kept.sum() == count
    np.testing.assert_array_equal(weights[kept], ratio.wanted[kept])
    for label in (0, 1):
        for expected in (False, True):
            of_query = ((wanted == label) & (ratio.agrees[1] == expected)).sum()
            rows = (labels == label) & (ratio.agrees[0] == expected)
            share = count * (of_query + 4 * ratio.wanted[rows].sum() / ratio.wanted.sum()) / (64 + 4)
            if share <= rows.sum():  # else the others take more
                assert kept[rows].sum() >= int(share)
            worst = ratio.of_pool[rows & kept].min()
            assert (ratio.of_pool[rows & ~kept] <= worst).all(), "the surest of each"
    plain = chosen_weights(ratio, SamplingConfig(stratify=False, soft=False), size=1000, labels=labels, wanted=wanted)
    even = round(ratio.standing.share * 1000)
    assert plain[np.argsort(-ratio.of_pool)[:even]].all() and plain.sum() == even, "without the margin"
    for undone in ({"replacement": False}, {"unbiased": True}, {"unbiased": True, "replacement": False}):
        as_even = chosen_weights(ratio, SamplingConfig(stratify=False, **undone), size=1000)
        np.testing.assert_array_equal(as_even, plain, err_msg=f"{undone}: draws or losses that know no weights")
    by_losses = chosen_weights(ratio, SamplingConfig(stratify=False, use="weight", replacement=False), size=1000)
    np.testing.assert_array_equal(by_losses, chosen_weights(ratio, SamplingConfig(stratify=False), size=1000))
    without = chosen_weights(ratio, SamplingConfig(), size=1000) > 0
    halves = np.array([without[~ratio.agrees[0]].sum(), without[ratio.agrees[0]].sum()])
    assert halves.sum() == count
    assert halves[0] == min((~ratio.agrees[0]).sum(), round(count / 2)), "numbers have halves, too"  # all there are


def test_of_a_part_of_the_pool_as_large_a_share_is_kept() -> None:
    few = ratio_of(0.01, queried=100)
    assert (chosen_weights(few, SamplingConfig(), size=1000) > 0).sum() == 100, "as many as the query has"
    assert (chosen_weights(few, SamplingConfig(), size=100_000) > 0).sum() < 20, "and of a large pool its part"


def sampled(answers: np.ndarray, states: np.ndarray, *, size: int | None = None) -> Any:
    shape = Shape(1, 1, 1, "classes")
    count = len(answers)
    return SimpleNamespace(
        answers=answers, states=states, count=count, shape=shape, size=size or count, is_whole=size is None
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30), st.integers(0, 100))
def test_spare_rows_are_those_beyond_the_first_of_each(texts: list[str], seed: int) -> None:
    groups = np.array([texts.index(text) for text in texts])
    times = np.array([texts.count(text) for text in texts])
    sample = sampled(np.zeros(len(texts)), np.zeros((len(texts), 1)))
    found = redundant(sample, groups, times, seed=seed)
    assert found.share == pytest.approx(spare_share(texts))
    assert found.low == found.share == found.high


def test_copies_outside_of_the_part_count() -> None:
    generator = np.random.default_rng(0)
    texts = np.concatenate([np.arange(600), np.repeat(np.arange(600, 680), 5)])
    rows = generator.permutation(1000)[:300]
    times = np.bincount(texts)[texts[rows]]
    sample = sampled(np.zeros(300), np.zeros((300, 1)), size=1000)
    found = redundant(sample, texts[rows], times, seed=0)
    assert found.low <= 1 - 680 / 1000 <= found.high
    assert "at least" in found.note


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_wrong_labels_are_counted(share: float) -> None:
    generator = np.random.default_rng(1)
    right = generator.integers(0, 2, 600)
    states = np.eye(2)[right] * 3 + generator.normal(size=(600, 2))
    flipped = generator.random(600) < share
    found = wrong_labels(sampled(right ^ flipped, states.astype(np.float32)), np.arange(600), classes=2, seed=0)
    assert found is not None and not found.note
    assert found.low - 0.02 <= flipped.mean() <= found.high + 0.02
    assert wrong_labels(sampled(np.ones(600), states), np.arange(600), classes=2, seed=0) is None
