"""What the papers' selectors compute, against slow references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from tests.reference import selectors as reference
from tsqlora_scale.quality.draws.redrawn_sampler import RedrawnSampler
from tsqlora_scale.quality.draws.subset import loss_weights
from tsqlora_scale.quality.features.last_layer import LastLayerLook
from tsqlora_scale.quality.features.unit_features import unit_features
from tsqlora_scale.quality.query.looks import Shape
from tsqlora_scale.quality.selectors import dsir, instruction_mining
from tsqlora_scale.quality.selectors.el2n import error_lengths
from tsqlora_scale.quality.selectors.in_turn import in_turn, rated_by_turns
from tsqlora_scale.quality.selectors.infobatch import below_the_mean
from tsqlora_scale.quality.selectors.k_center import center_ratings
from tsqlora_scale.quality.selectors.less import leading_directions
from tsqlora_scale.quality.selectors.rds import cosines_to
from tsqlora_scale.quality.selectors.rho import reducible
from tsqlora_scale.quality.selectors.ts_dshapley import neighbour_values, valuing_rows
from tsqlora_scale.tasks.batch import IGNORED, Batch

VOCABULARY = ("the", "film", "is", "good", "bad")
WORDS = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=30)
SMALL = st.integers(-3, 3)


@given(st.data(), st.integers(1, 6), st.integers(1, 7))
@settings(max_examples=40)
def test_shapley_values_are_those_of_the_definition(data: st.DataObject, size: int, neighbours: int) -> None:
    likeness = data.draw(arrays(np.float64, size, elements=SMALL))  # ties, too
    match = data.draw(arrays(np.float64, size, elements=st.floats(-2, 2)))
    found = neighbour_values(likeness, match, neighbours)
    np.testing.assert_allclose(found, reference.shapley_values(likeness, match, neighbours), atol=1e-9)
    everyone = reference.neighbours_worth(likeness, match, range(size), neighbours)
    assert found.sum() == pytest.approx(everyone, abs=1e-9)  # nothing is lost


def test_no_players_have_no_values() -> None:
    assert neighbour_values(np.empty(0), np.empty(0), 3).shape == (0,)


@given(st.data(), st.integers(1, 9), st.integers(1, 4))
def test_choices_in_turn(data: st.DataObject, size: int, turns: int) -> None:
    likeness = data.draw(arrays(np.float32, (size, turns), elements=SMALL)) / np.float32(3)
    count = data.draw(st.integers(0, size))
    picks = in_turn(likeness, count)
    assert picks.tolist() == reference.in_turn(likeness, count)
    ratings = rated_by_turns(likeness, count)
    assert np.argsort(-ratings, kind="stable")[:count].tolist() == picks.tolist()
    assert (ratings[picks] > 1).all()
    assert (np.delete(ratings, picks) <= 1).all()


@given(st.data(), st.integers(1, 8), st.integers(0, 3))
def test_centers_are_the_farthest_ones(data: st.DataObject, size: int, given_centers: int) -> None:
    coordinates = st.integers(-9, 9).map(float)
    features = data.draw(arrays(np.float32, (size, 2), elements=coordinates))
    centers = data.draw(arrays(np.float32, (given_centers, 2), elements=coordinates))
    count = data.draw(st.integers(1, size))
    ratings = center_ratings(features, centers, count)
    chosen = np.argsort(-ratings, kind="stable")[:count].tolist()
    expected = reference.k_centers(features, centers, count)
    if given_centers or size == 1:  # ties at the mean go by rounding
        assert chosen == expected
    assert (np.sort(ratings)[: -count or None][: size - count] <= 1).all()
    if not given_centers:  # Sener and Savarese: at most twice the least possible radius
        radius = min(
            reference.covering_radius(features, [*others]) for others in itertools.combinations(range(size), count)
        )
        assert reference.covering_radius(features, chosen) <= 2 * radius + 1e-6


@given(st.lists(WORDS, min_size=1, max_size=5), st.lists(WORDS, min_size=1, max_size=4))
@settings(max_examples=40)
def test_importance_of_texts(pool: list[list[str]], query: list[list[str]]) -> None:
    """No two of these few words and pairs share a bucket, so that hashing changes nothing."""
    texts = [*pool, *query]
    counts = [
        sum(np.bincount(dsir.hashed(" ".join(words)), minlength=dsir.BUCKETS) for words in part)
        for part in (query, pool)
    ]
    ratio = dsir.log_ratio(*counts)
    for words in texts:
        found = ratio[dsir.hashed(" ".join(words))].sum()
        assert found == pytest.approx(reference.dsir_log_weight(words, pool, query, dsir.BUCKETS), abs=1e-8)


def test_these_words_and_pairs_have_buckets_of_their_own() -> None:
    grams = [*VOCABULARY, *(f"{a} {b}" for a in VOCABULARY for b in VOCABULARY)]
    assert len({int(place) for gram in grams for place in dsir.hashed(gram)}) == len(grams)


def test_words_are_as_nltk_cuts_them() -> None:
    assert (
        len(dsir.hashed("It's GOOD, isn't it?!"))
        == 2 * len(["It", "'", "s", "GOOD", ",", "isn", "'", "t", "it", "?!"]) - 1
    )
    np.testing.assert_array_equal(dsir.hashed("Good FILM"), dsir.hashed("good film"))
    assert dsir.hashed("").shape == (0,)


@given(WORDS)
def test_lexical_diversity(words: list[str]) -> None:
    assert instruction_mining.lexical_diversity(words) == pytest.approx(reference.lexical_diversity(words))


def test_lexical_diversity_of_nothing_and_of_different_words() -> None:
    assert instruction_mining.lexical_diversity([]) == 0
    assert instruction_mining.lexical_diversity(["a", "b", "c"]) == 3


def test_linear_models_of_subsets() -> None:
    generator = np.random.default_rng(0)
    x, y, z = generator.normal(size=(9, 4)), generator.normal(size=(9, 2)), generator.normal(size=(3, 4))
    found = instruction_mining.ridge_answers(x, y, z)
    np.testing.assert_allclose(found, reference.ridge_answers(x, y, z, instruction_mining.RIDGE), atol=1e-10)


def test_a_sixth_neighbour_is_the_sixth() -> None:
    features = np.arange(10, dtype=np.float32)[:, None]
    found = instruction_mining.sixth_distances(features, seed=0)
    expected = [sorted(abs(i - j) for j in range(10) if j != i)[5] for i in range(10)]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert instruction_mining.sixth_distances(features[:1], seed=0).tolist() == [0.0]


def test_losses_are_out_of_sample() -> None:
    """Of what cannot be learned, the error is that of a guess, however many features there are."""
    generator = np.random.default_rng(1)
    features = np.eye(40)[generator.permutation(40)]  # by which any answer can be learned by heart
    errors = instruction_mining.out_of_sample(features, generator.choice([-1.0, 1.0], (40, 1)), seed=0)
    assert errors.mean() > 0.9


def test_a_line_finds_what_helps() -> None:
    """Where half of the samples are noise that an indicator knows of, it has a slope and the others have hardly any."""
    generator = np.random.default_rng(2)
    noisy = generator.random(400) < 0.5
    x = generator.normal(size=(400, 6))
    right = x[:, :1] + 0.0
    answers = np.where(noisy[:, None], generator.normal(size=(400, 1)), right)
    indicators = np.column_stack([noisy * 2.0 - 1, generator.normal(size=(400, 2))])
    judge = generator.normal(size=(100, 6))
    means, losses = [], []
    for rows in instruction_mining.leaning_subsets(indicators, 80, seed=0):
        means.append(indicators[rows].mean(0))
        predicted = instruction_mining.ridge_answers(x[rows], answers[rows], judge)
        losses.append(np.log(np.square(predicted - judge[:, :1]).mean()))
    line = instruction_mining.fitted_line(np.array(means), np.array(losses))
    assert line[0] > 0.5
    assert abs(line[1:]).max() < line[0] / 3


class Classifier(nn.Module):
    def forward(self, logits: torch.Tensor) -> nn.Module:
        self.logits = logits
        return self


@given(st.data(), st.integers(2, 5), st.integers(1, 6))
def test_lengths_of_errors(data: st.DataObject, classes: int, size: int) -> None:
    logits = torch.from_numpy(data.draw(arrays(np.float32, (size, classes), elements=st.integers(-9, 9).map(float))))
    labels = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=size, max_size=size)))
    found = error_lengths(Classifier(), Batch({"logits": logits}, labels, np.arange(size)))
    rows = zip(logits.tolist(), labels.tolist(), strict=True)
    np.testing.assert_allclose(found[:, 0], [reference.error_length(row, label) for row, label in rows], atol=1e-6)
    assert found.max() <= 2**0.5 + 1e-6


@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 99))
def test_leading_directions_of_a_query(size: int, count: int, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(size, 6)).astype(np.float32)
    found = leading_directions(rows, count)
    assert found.shape == (min(size, count), 6)
    np.testing.assert_allclose(found @ found.T, np.eye(len(found)), atol=1e-5)
    best = np.sort(np.linalg.eigvalsh(rows.T.astype(np.float64) @ rows))[::-1][: len(found)]
    np.testing.assert_allclose(np.square(rows @ found.T).sum(0), best, rtol=1e-4)


@given(
    st.lists(st.sampled_from([0.1, 0.5, 2.0, float("nan")]), min_size=1, max_size=12),
    st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_who_may_be_skipped(losses: list[float], coins: list[bool]) -> None:
    below = below_the_mean(np.array(losses))
    heavy = below * 2.0 * ~np.array(coins[: len(losses)]) + ~below
    assert heavy.tolist() == reference.kept_of_the_known(losses, coins[: len(losses)])


class States(nn.Module):
    """Gives hidden states that it is handed."""

    def __init__(self, **outputs: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.__dict__ |= outputs

    def forward(self, **inputs: object) -> nn.Module:
        return self


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", ["classes", "causal", "seq2seq", "seq2seq classes"])
def test_pooled_states(kind: str, left: bool, by_position: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, width = [1, 4, 6], 5
    states = torch.randn(3, 6, width, generator=generator)
    mask = torch.zeros(3, 6, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(6 - length, 6) if left else slice(0, length)] = 1
    targets = torch.where(mask > 0, 7, IGNORED) if kind in ("causal", "seq2seq") else torch.zeros(3, dtype=torch.int64)
    other = torch.full_like(states, 1e6)
    if kind == "seq2seq":  # the decoder's own positions are those of its targets
        module = States(encoder_hidden_states=(other, other), decoder_hidden_states=(other, states))
        batch = Batch({"attention_mask": torch.ones(3, 2, dtype=torch.int64)}, targets, np.arange(3))
    elif kind == "seq2seq classes":
        module = States(encoder_hidden_states=(other, states), decoder_hidden_states=(other, other))
        batch = Batch({"attention_mask": mask}, targets, np.arange(3))
    else:
        module = States(hidden_states=(other, states))
        batch = Batch({"attention_mask": mask}, targets, np.arange(3))
    found = LastLayerLook(by_position=by_position)(module, batch)
    for row in range(3):
        own = [states[row, place] for place in range(6) if mask[row, place]]
        weights = [place + 1 if by_position else 1 for place in range(len(own))]
        expected = sum(w * state for w, state in zip(weights, own, strict=True)) / sum(weights)
        torch.testing.assert_close(found[row], expected)


def test_cosines_and_unit_features() -> None:
    generator = np.random.default_rng(0)
    pool, query = generator.normal(size=(5, 4)).astype(np.float32), generator.normal(size=(2, 4)).astype(np.float32)
    pool[3] = 0
    found = cosines_to(pool, query)
    expected = [[reference.cosine(a, b) for b in query] for a in pool]
    np.testing.assert_allclose(found, expected, atol=1e-6)

    shape = Shape(layers=2, regions=2, width=3, kind="text")
    numbers = generator.normal(size=(6, 13)).astype(np.float32)
    features, last = unit_features(numbers[4:], shape, pool=numbers)
    layers, own = shape.split(numbers)
    scaled = (layers - layers.mean(0)) / layers.std(0)
    np.testing.assert_allclose(last, own[4:], atol=1e-6)
    for region in range(2):
        cosines = [reference.cosine(scaled[4, layer, region], scaled[5, layer, region]) for layer in range(2)]
        assert features[0, region] @ features[1, region] == pytest.approx(np.mean(cosines), abs=1e-4)


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=9))
def test_reducible_loss_is_the_difference_of_losses(losses: list[tuple[float, float]]) -> None:
    of_pool, of_query = np.array(losses).T
    expected = [pool - query for pool, query in losses]
    np.testing.assert_allclose(reducible(-of_query, -of_pool), expected)


def test_valuing_rows_leave_half_to_be_valued() -> None:
    assert len(valuing_rows(9, 500, seed=0)) == 4
    assert len(valuing_rows(9000, 500, seed=0)) == 500
    assert len(valuing_rows(1, 500, seed=0)) == 1


@given(st.integers(1, 40), st.integers(0, 3), st.integers(1, 9), st.data())
@settings(max_examples=40)
def test_redrawn_rounds(size: int, always: int, batch: int, data: st.DataObject) -> None:
    """Every round is a subset without repeats, with what always belongs to it, drawn independently of the others."""
    count = data.draw(st.integers(1, size))
    rows, own = np.arange(size) * 2, size * 2 + np.arange(always)
    sampler = RedrawnSampler(rows, None, count=count, always=own, batch_size=batch, seed=3)
    whole = count + always
    steps = -(-3 * whole // batch)
    drawn = np.concatenate([sampler.draw(step) for step in range(steps)])
    rounds = [drawn[i * whole : (i + 1) * whole] for i in range(3)]
    for members in rounds:
        assert len(set(members.tolist())) == whole
        assert set(own.tolist()) <= set(members.tolist())
        assert set(members.tolist()) <= {*rows.tolist(), *own.tolist()}
    anew = RedrawnSampler(rows, None, count=count, always=own, batch_size=batch, seed=3)
    np.testing.assert_array_equal(anew.draw(steps - 1), sampler.draw(steps - 1))  # a function of the step alone
    if size >= 30 and 5 <= count <= size - 5:
        assert {*rounds[0].tolist()} != {*rounds[1].tolist()}


def test_redrawn_rounds_follow_weights() -> None:
    weights = np.array([1.0, 1, 1, 1, 8])
    sampler = RedrawnSampler(np.arange(5), weights, count=1, always=np.empty(0, np.int64), batch_size=1, seed=0)
    found = np.bincount(np.concatenate([sampler.draw(step) for step in range(1200)]), minlength=5) / 1200
    np.testing.assert_allclose(found, weights / weights.sum(), atol=0.05)


def test_weights_of_losses_are_a_share_of_the_draws() -> None:
    np.testing.assert_allclose(loss_weights(np.array([0.1, 0.2, 0.7]), 2.0), [0.3, 0.6, 2.0])
