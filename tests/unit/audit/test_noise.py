"""How probably labels and numbers are wrong: against Bayes' rule, and on pools whose noise is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.audit import wrong_label
from tsqlora_scale.audit import label_noise
from tsqlora_scale.audit.label_noise import judge_labels, log_labels, right_classes
from tsqlora_scale.audit.number_noise import judge_numbers
from tsqlora_scale.audit.share_belief import ShareBelief


def pool(size: int, classes: int, share: float, *, strength: float, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Scores of one source, given and right labels."""
    generator = np.random.default_rng(seed)
    right = generator.integers(0, classes, size)
    scores = strength * np.eye(classes)[right] + generator.normal(size=(size, classes))
    flipped = generator.random(size) < share
    given_labels = np.where(flipped, (right + generator.integers(1, classes, size)) % classes, right)
    return scores[None], given_labels, right


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000), classes=st.integers(2, 5), rate=st.floats(0.01, 0.5), sources=st.integers(1, 3)
)  # fmt: skip
def test_bayes_rule(seed: int, classes: int, rate: float, sources: int) -> None:
    generator = np.random.default_rng(seed)
    scores = torch.from_numpy(generator.normal(size=(sources, 6, classes)))
    labels = torch.from_numpy(generator.integers(0, classes, 6))
    parameters = torch.from_numpy(np.abs(generator.normal(size=sources + classes)))
    rates = np.array([rate])
    judged = label_noise._averaged(scores, labels, rates, np.ones(1), [parameters])
    q = right_classes(scores, parameters).exp().numpy()
    expected = [wrong_label(q[i].tolist(), int(labels[i]), rate) for i in range(6)]
    np.testing.assert_allclose(judged.wrong, expected, atol=1e-9)
    np.testing.assert_allclose(judged.classes.sum(1), 1)
    np.testing.assert_allclose(np.log(judged.given), log_labels(scores, labels, rate, parameters), atol=1e-9)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_the_share_is_found_where_texts_are_clear(classes: int, share: float) -> None:
    scores, given_labels, right = pool(1500, classes, share, strength=5.0)
    judged = judge_labels(scores, given_labels, seed=0)
    wrong = given_labels != right
    low, high = judged.share.interval(0.99)
    assert low - 0.01 <= wrong.mean() <= high + 0.01
    assert abs(judged.share.share - wrong.mean()) < 0.03
    if share:
        assert judged.wrong[wrong].mean() > 0.9 > 0.1 > judged.wrong[~wrong].mean()
        assert abs(judged.wrong.mean() - wrong.mean()) < 0.03, "calibrated as a whole"


def test_nothing_is_claimed_where_nothing_is_known() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 800)
    judged = judge_labels(generator.normal(size=(1, 800, 2)), labels, seed=0)
    low, high = judged.share.interval()
    assert low < 0.02 and high > 0.35
    assert judged.gain < 0.02


def test_the_order_is_that_of_the_label_s_probability() -> None:
    scores, given_labels, _ = pool(600, 3, 0.2, strength=2.0)
    judged = judge_labels(scores, given_labels, seed=0)
    by_given, by_wrong = np.argsort(judged.given), np.argsort(-judged.wrong)
    assert np.corrcoef(np.argsort(by_given), np.argsort(by_wrong))[0, 1] > 0.99


def test_a_useless_source_has_no_say() -> None:
    scores, given_labels, _ = pool(1000, 2, 0.1, strength=3.0)
    noise = np.random.default_rng(1).normal(size=scores.shape)
    judged = judge_labels(np.concatenate([scores, noise]), given_labels, seed=0)
    assert judged.weights[1] < 0.1 * judged.weights[0]


def test_large_pools_are_fitted_on_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, given_labels, _ = pool(1200, 2, 0.2, strength=3.0)
    whole = judge_labels(scores, given_labels, seed=0)
    monkeypatch.setattr(label_noise, "FIT_SAMPLES", 600)
    part = judge_labels(scores, given_labels, seed=0)
    assert len(part.wrong) == 1200
    assert abs(part.share.share - whole.share.share) < 0.05
    monkeypatch.setattr(label_noise, "FIT_SAMPLES", 75)
    widths = [
        judged.share.interval()[1] - judged.share.interval()[0]
        for judged in (whole, *(judge_labels(scores, given_labels, seed=seed) for seed in range(3)))
    ]
    assert min(widths[1:]) > 4 * widths[0], "a sixteenth says of the rate what a sixteenth can, whichever it is"


@pytest.mark.parametrize("share", [0.0, 0.15])
def test_numbers_of_other_texts(share: float) -> None:
    generator = np.random.default_rng(0)
    right = generator.normal(3, 1.5, 1200)
    scores = np.stack([0.5 * right + generator.normal(0, 0.2, 1200), generator.normal(size=1200)])
    wrong = generator.random(1200) < share
    numbers = np.where(wrong, generator.permutation(right), right)
    judged = judge_numbers(scores, numbers)
    low, high = judged.share.interval(0.99)
    assert low - 0.03 <= share <= high + 0.03
    if share:
        assert judged.wrong[wrong].mean() > 0.5 > 0.1 > judged.wrong[~wrong].mean()


def test_numbers_that_are_all_the_same() -> None:
    judged = judge_numbers(np.zeros((1, 20)), np.full(20, 2.0))
    assert np.isfinite(judged.wrong).all()
    assert (judged.wrong < 0.5).all()


def test_an_interval_holds_what_is_believed() -> None:
    belief = ShareBelief(np.arange(5.0), np.array([0.02, 0.28, 0.4, 0.28, 0.02]), np.arange(5.0))
    assert belief.share == pytest.approx(2.0)
    assert belief.interval(0.9) == (1.0, 3.0)
