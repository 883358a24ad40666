"""The metrics that tasks report, by scikit-learn, scipy and ``rouge_score``.

Those of answers are fractions, in [0, 1] or [-1, 1], ROUGE too; papers print the same numbers times 100. Errors and
losses are numbers from 0 on, of which less is better.
"""

from __future__ import annotations

import difflib
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tsqlora_scale.common.errors import UserError


def accuracy(predictions: list[int], references: list[int], num_labels: int) -> float:
    """Share of samples whose predicted class is right, in [0, 1]."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(references, predictions))


def _averaged(score: str, average: str | None) -> Callable[[list[int], list[int], int], float]:
    """scikit-learn's ``f1``, ``precision`` or ``recall``, in [0, 1].

    A class that neither predictions nor references hold is left out of a mean; what has nothing to divide by is 0.

    Args:
        average: ``macro`` (unweighted mean over classes), ``micro`` (of all decisions together), ``weighted`` (mean
            over classes, by their frequency); none: of class 1 for two classes, macro for more.
    """

    def compute(predictions: list[int], references: list[int], num_labels: int) -> float:
        from sklearn import metrics

        chosen = average or ("binary" if num_labels == 2 else "macro")
        found = getattr(metrics, f"{score}_score")(references, predictions, average=chosen, zero_division=0)
        return float(found)

    return compute


def matthews_correlation(predictions: list[int], references: list[int], num_labels: int) -> float:
    """Matthews correlation of predicted and true classes (CoLA's metric), in [-1, 1]; 0 where either is all alike."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(references, predictions)) if _both_vary(predictions, references) else 0.0


def pearson(predictions: list[float], references: list[float], num_labels: int) -> float:
    """Linear correlation in [-1, 1]; 0 where predictions or references are all equal."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, references)


def spearman(predictions: list[float], references: list[float], num_labels: int) -> float:
    """Rank correlation in [-1, 1]; 0 where predictions or references are all equal."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, references)


def _correlation(correlate: Callable[..., Any], predictions: list[float], references: list[float]) -> float:
    if not _both_vary(predictions, references):
        return 0.0
    with warnings.catch_warnings():  # values that differ in the last digits only
        warnings.simplefilter("ignore")
        return float(correlate(predictions, references).statistic)


def _both_vary(predictions: list[Any], references: list[Any]) -> bool:
    return _varies(predictions) and _varies(references)


def _varies(values: list[Any]) -> bool:
    return any(value != values[0] for value in values[1:])  # NaN differs from itself, so it is never called constant


def mean_squared_error(predictions: list[float], references: list[float], num_labels: int) -> float:
    """Mean squared difference, in the target's unit squared; NaN where a prediction is."""
    return float(np.mean(np.square(np.subtract(predictions, references, dtype=np.float64))))


def mean_absolute_error(predictions: list[float], references: list[float], num_labels: int) -> float:
    """Mean absolute difference, in the target's unit; NaN where a prediction is."""
    return float(np.mean(np.abs(np.subtract(predictions, references, dtype=np.float64))))


def exact_match(predictions: list[str], references: list[str], num_labels: int) -> float:
    """Share of texts that are the reference, character by character, in [0, 1].

    Runs of blanks count as one and those at the ends not at all; accents may be composed or not (NFC).
    """
    pairs = zip(predictions, references, strict=True)
    return float(np.mean([_plain(text) == _plain(target) for text, target in pairs]))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def rouge(names: Sequence[str], predictions: list[str], references: list[str]) -> dict[str, float]:
    """ROUGE F-measures in [0, 1] (Lin 2004), mean over samples; all in one pass.

    Words are those of :class:`.UnicodeWords`: for a text of ASCII, the stemmed ones of ``rouge_score``.

    Args:
        names: of ``rouge1`` (words), ``rouge2`` (pairs of words), ``rougeL`` (longest common subsequence) and
            ``rougeLsum`` (the same by lines, for texts of several).
    """
    from rouge_score.rouge_scorer import RougeScorer

    from tsqlora_scale.tasks.rouge_words import UnicodeWords

    scorer = RougeScorer(list(names), tokenizer=UnicodeWords())
    scores = [scorer.score(target, text) for target, text in zip(references, predictions, strict=True)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in names}


@dataclass(frozen=True)
class SampleLosses:
    """The losses of the rows of a split, in their order.

    Attributes:
        sums: summed loss of every sample, (N,) float32.
        terms: number of its loss terms, (N,) float32: 1, or its target tokens.
    """

    sums: np.ndarray
    terms: np.ndarray


def mean_loss(losses: SampleLosses) -> float:
    """Mean over samples of a sample's own loss: cross-entropy, squared error, or the mean over its target tokens. A
    text of which nothing is to be told, of unknown characters alone, has none."""
    told = losses.terms > 0
    return float(np.mean(losses.sums[told].astype(np.float64) / losses.terms[told])) if told.any() else float("nan")


def perplexity(losses: SampleLosses) -> float:
    """exp of the mean cross-entropy of all target tokens, each counting the same; infinite where that overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(losses.sums.sum(dtype=np.float64) / losses.terms.sum(dtype=np.float64)))


@dataclass(frozen=True)
class MetricSpec:
    """How a metric is computed, and which tasks it fits.

    Attributes:
        compute: from predictions, references and the number of classes; none: by :func:`rouge`, or ``of_losses``.
        of_losses: from the samples' losses, without predictions.
    """

    compute: Callable[[list[Any], list[Any], int], float] | None
    task_types: tuple[str, ...]
    higher_is_better: bool = True
    of_losses: Callable[[SampleLosses], float] | None = None


_CLASSES = ("classification",)
_NUMBERS = ("regression",)
_TEXTS = ("seq2seq", "causal")

_ANY = _CLASSES + _NUMBERS + _TEXTS

METRICS = {
    "accuracy": MetricSpec(accuracy, _CLASSES),
    **{
        f"{score}_{average}" if average else score: MetricSpec(_averaged(score, average), _CLASSES)
        for score in ("f1", "precision", "recall")
        for average in (None, "macro", "micro", "weighted")
    },
    "matthews_correlation": MetricSpec(matthews_correlation, _CLASSES),
    "pearson": MetricSpec(pearson, _NUMBERS),
    "spearman": MetricSpec(spearman, _NUMBERS),
    "mse": MetricSpec(mean_squared_error, _NUMBERS, higher_is_better=False),
    "mae": MetricSpec(mean_absolute_error, _NUMBERS, higher_is_better=False),
    "rouge1": MetricSpec(None, _TEXTS),
    "rouge2": MetricSpec(None, _TEXTS),
    "rougeL": MetricSpec(None, _TEXTS),
    "rougeLsum": MetricSpec(None, _TEXTS),
    "exact_match": MetricSpec(exact_match, _TEXTS),
    "perplexity": MetricSpec(None, _TEXTS, higher_is_better=False, of_losses=perplexity),
    "loss": MetricSpec(None, _ANY, higher_is_better=False, of_losses=mean_loss),
}


def needs_answers(names: Sequence[str]) -> bool:
    """Whether any of the metrics is taken of the model's answers, so that it has to be asked for them."""
    return any(METRICS[name].of_losses is None for name in names)


def needs_losses(names: Sequence[str]) -> bool:
    """Whether any of the metrics is taken of the samples' losses."""
    return any(METRICS[name].of_losses is not None for name in names)


def metric_title(name: str, labels: Sequence[str] | int | None) -> str:
    """A metric's name for people: of a mean or of one class, it says which where the name does not.

    Args:
        name: of a metric, ``SET/METRIC`` where there are several held-out sets.
        labels: ``task.labels``.
    """
    if name.rpartition("/")[2] not in ("f1", "precision", "recall") or labels is None:
        return name
    if (labels if isinstance(labels, int) else len(labels)) != 2:
        return f"{name} (macro)"
    return f"{name} (of class {1 if isinstance(labels, int) else labels[1]})"


def check_metrics(names: Sequence[str], task_type: str) -> None:
    """Check that the metrics exist and fit the task.

    Raises:
        UserError: naming the metric and those that the task can have.
    """
    fitting = [name for name, spec in METRICS.items() if task_type in spec.task_types]
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, 1, 0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"task.metrics: unknown metric {name!r}; {hint}Known: {', '.join(METRICS)}")
        if name not in fitting:
            raise UserError(f"task.metrics: {name!r} does not fit a {task_type} task; use {', '.join(fitting)}")


def compute_metrics(
    names: Sequence[str],
    predictions: list[Any],
    references: list[Any],
    *,
    num_labels: int = 0,
    losses: SampleLosses | None = None,
) -> dict[str, float]:
    """The named metrics, in the order of ``names``.

    Args:
        names: metrics that fit one task type.
        predictions: N class ids, numbers or texts; none where all metrics are taken of losses.
        references: N of the same kind.
        num_labels: number of classes; decides between binary and macro F1.
        losses: where a metric is taken of them.
    """
    assert not needs_answers(names) or len(predictions) == len(references) > 0, (len(predictions), len(references))
    results: dict[str, float] = {}
    for name in names:
        spec = METRICS[name]
        if spec.of_losses is not None:
            assert losses is not None, f"{name} is taken of losses"
            results[name] = spec.of_losses(losses)
        elif spec.compute is not None:
            results[name] = spec.compute(predictions, references, num_labels)
    rouge_names = [name for name in names if name not in results]
    if rouge_names:
        results |= rouge(rouge_names, predictions, references)
    return {name: results[name] for name in names}
