"""Metrics against scikit-learn, scipy and rouge_score called directly."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from sklearn import metrics as sk

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.tasks.metrics import (
    METRICS,
    SampleLosses,
    check_metrics,
    compute_metrics,
    metric_title,
    needs_answers,
    needs_losses,
)

RNG = np.random.default_rng(0)
TRUE = RNG.integers(0, 2, 200).tolist()
GUESS = [int(t) if RNG.random() < 0.8 else 1 - int(t) for t in TRUE]
CLASSES = ["accuracy", "f1", "matthews_correlation"]
TEXTS = ["The cats are sitting on mats.", "A dull film", "no overlap"]
SUMMARIES = ["The cat sat on the mat", "A dull film", "something else"]


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_two_classes() -> None:
    assert compute_metrics(CLASSES, GUESS, TRUE, num_labels=2) == pytest.approx(
        {
            "accuracy": sk.accuracy_score(TRUE, GUESS),
            "f1": sk.f1_score(TRUE, GUESS),
            "matthews_correlation": sk.matthews_corrcoef(TRUE, GUESS),
        }
    )


def test_f1_of_more_classes_is_the_macro_mean() -> None:
    true, guess = RNG.integers(0, 4, 100).tolist(), RNG.integers(0, 4, 100).tolist()
    by_hand = []
    for c in range(4):
        hits = sum(t == g == c for t, g in zip(true, guess, strict=True))
        by_hand.append(2 * hits / (true.count(c) + guess.count(c)))
    assert compute_metrics(["f1"], guess, true, num_labels=4)["f1"] == pytest.approx(np.mean(by_hand))


@pytest.mark.parametrize("score", ["f1", "precision", "recall"])
@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
@pytest.mark.parametrize("classes", [2, 4])
def test_averages_are_those_that_the_name_says(score: str, average: str, classes: int) -> None:
    true, guess = RNG.integers(0, classes, 90).tolist(), RNG.integers(0, classes, 90).tolist()
    expected = getattr(sk, f"{score}_score")(true, guess, average=average)
    name = f"{score}_{average}"
    assert compute_metrics([name], guess, true, num_labels=classes) == {name: pytest.approx(expected)}
    if average == "macro" and classes > 2:
        assert compute_metrics([score], guess, true, num_labels=classes) == {score: pytest.approx(expected)}
    if average == "macro" and classes == 2:
        of_one = getattr(sk, f"{score}_score")(true, guess)
        assert compute_metrics([score], guess, true, num_labels=2) == {score: pytest.approx(of_one)} != expected


def test_a_title_says_of_which_class_or_mean() -> None:
    assert metric_title("f1", ["bad", "good"]) == "f1 (of class good)"
    assert metric_title("news/f1", ["bad", "good"]) == "news/f1 (of class good)"
    assert metric_title("recall", 2) == "recall (of class 1)"
    assert metric_title("f1", 3) == metric_title("f1", ["a", "b", "c"]) == "f1 (macro)"
    assert [metric_title(name, 2) for name in ("f1_macro", "accuracy")] == ["f1_macro", "accuracy"]
    assert metric_title("rouge1", None) == "rouge1"


def test_errors_of_numbers() -> None:
    true, guess = [1.0, -2.0, 4.0], [1.5, -2.0, 1.0]
    assert compute_metrics(["mse", "mae"], guess, true) == pytest.approx({"mse": 9.25 / 3, "mae": 3.5 / 3})
    assert np.isnan(list(compute_metrics(["mse", "mae"], [1.0, float("nan"), 1.0], true).values())).all()


def test_exact_match() -> None:
    pairs = [
        ("a film", "a film"),
        (" a  film\n", "a film"),
        ("A film", "a film"),
        ("caf\u00e9", "cafe\u0301"),
        ("", "x"),
    ]
    guess, true = [list(side) for side in zip(*pairs, strict=True)]
    assert compute_metrics(["exact_match"], guess, true) == {"exact_match": 0.6}


def test_loss_is_the_samples_and_perplexity_the_tokens() -> None:
    losses = SampleLosses(np.array([2.0, 9.0], np.float32), np.array([1.0, 9.0], np.float32))
    found = compute_metrics(["perplexity", "loss"], [], [], losses=losses)
    assert found == {"perplexity": pytest.approx(np.exp(1.1)), "loss": pytest.approx(1.5)}
    diverged = SampleLosses(np.array([5000.0], np.float32), np.array([1.0], np.float32))
    assert compute_metrics(["perplexity"], [], [], losses=diverged) == {"perplexity": np.inf}


def test_what_metrics_are_taken_of() -> None:
    assert not needs_answers(["loss", "perplexity"]) and needs_losses(["loss"])
    assert needs_answers(["loss", "rouge1"]) and needs_losses(["rouge1", "loss"])
    assert needs_answers(["accuracy"]) and not needs_losses(["accuracy"])
    smaller = {name for name, spec in METRICS.items() if not spec.higher_is_better}
    assert smaller == {"loss", "perplexity", "mse", "mae"}


def test_correlations() -> None:
    true = RNG.normal(size=100)
    guess = true + RNG.normal(size=100)
    found = compute_metrics(["spearman", "pearson"], guess.tolist(), true.tolist())
    assert list(found) == ["spearman", "pearson"]  # the order asked for
    assert found["pearson"] == pytest.approx(np.corrcoef(true, guess)[0, 1])
    assert found["spearman"] == pytest.approx(stats.spearmanr(true, guess).statistic)


def test_rouge_is_the_mean_with_stemming() -> None:
    names = ["rougeL", "rouge1", "rouge2"]
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(s, t) for s, t in zip(SUMMARIES, TEXTS, strict=True)]
    found = compute_metrics(names, TEXTS, SUMMARIES)
    assert found == pytest.approx({n: np.mean([s[n].fmeasure for s in scores]) for n in names})
    assert compute_metrics(["rouge1"], ["cats"], ["cat"]) == {"rouge1": 1.0}
    assert compute_metrics(["rouge1"], [""], ["cat"]) == {"rouge1": 0.0}


def test_rouge_by_lines() -> None:
    scorer = RougeScorer(["rougeLsum"], use_stemmer=True)
    target, text = "the cat sat\non the mat", "on a mat\nthe cats sat"
    expected = scorer.score(target, text)["rougeLsum"].fmeasure
    assert compute_metrics(["rougeLsum", "rougeL"], [text], [target])["rougeLsum"] == expected > 0.7
    assert compute_metrics(["rougeL"], [text], [target])["rougeL"] < expected


@pytest.mark.parametrize(("guess", "true"), [([1, 1, 1], [0, 1, 1]), ([0, 1, 1], [0, 0, 0]), ([1], [1])])
def test_constant_answers_score_zero_without_a_warning(guess: list[int], true: list[int]) -> None:
    assert compute_metrics(["matthews_correlation"], guess, true, num_labels=2)["matthews_correlation"] == 0.0
    numbers = compute_metrics(["pearson", "spearman"], [float(g) for g in guess], [float(t) for t in true])
    assert numbers == {"pearson": 0.0, "spearman": 0.0}


def test_f1_without_any_positive() -> None:
    assert compute_metrics(["f1"], [0, 0], [0, 0], num_labels=2) == {"f1": 0.0}


def test_a_diverged_model_is_not_hidden() -> None:
    nan = float("nan")
    for guess in ([nan, 1.0, 2.0], [nan, nan, nan], [1.0, 1.0, nan]):
        found = compute_metrics(["pearson", "spearman"], guess, [1.0, 2.0, 3.0])
        assert np.isnan(list(found.values())).all(), guess


def test_nothing_is_printed_or_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    state = np.random.get_state()[1].copy()
    with caplog.at_level(logging.WARNING):
        compute_metrics(CLASSES, GUESS, TRUE, num_labels=2)
        compute_metrics(["rouge1"], TEXTS, SUMMARIES)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert (np.random.get_state()[1] == state).all()


def test_unknown_and_unfit_metrics() -> None:
    for name, spec in METRICS.items():
        for task in spec.task_types:
            check_metrics([name], task)
    with pytest.raises(UserError, match=r"unknown metric 'rouge3'; did you mean .*Known: accuracy, f1, f1_macro,"):
        check_metrics(["rouge1", "rouge3"], "seq2seq")
    with pytest.raises(UserError, match=r"'f1' does not fit a regression task; use pearson, spearman, mse, mae, loss"):
        check_metrics(["pearson", "f1"], "regression")


def test_as_many_predictions_as_references() -> None:
    with pytest.raises(AssertionError):
        compute_metrics(["accuracy"], [1, 0], [1])
    with pytest.raises(AssertionError):
        compute_metrics(["accuracy"], [], [])
