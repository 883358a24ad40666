"""The metrics that tasks report, by scikit-learn, scipy and ``rouge_score``.

Every metric is a fraction, in [0, 1] or [-1, 1]; papers print the same numbers times 100. ROUGE too: one scale for all,
so that a report can treat them alike.
"""

from __future__ import annotations

import difflib
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


def f1(predictions: list[int], references: list[int], num_labels: int) -> float:
    """F1 in [0, 1]: of class 1 for two classes, the unweighted (macro) mean over classes for more.

    A class that neither predictions nor references hold is left out of the mean; 0 where precision and recall are both
    undefined.
    """
    from sklearn.metrics import f1_score

    average = "binary" if num_labels == 2 else "macro"
    return float(f1_score(references, predictions, average=average, zero_division=0))


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


def rouge(names: Sequence[str], predictions: list[str], references: list[str]) -> dict[str, float]:
    """ROUGE F-measures in [0, 1] (Lin 2004), Porter stemmer on, mean over samples; all in one pass.

    Args:
        names: of ``rouge1`` (words), ``rouge2`` (pairs of words) and ``rougeL`` (longest common subsequence).
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(names), use_stemmer=True)
    scores = [scorer.score(target, text) for target, text in zip(references, predictions, strict=True)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in names}


@dataclass(frozen=True)
class MetricSpec:
    """How a metric is computed (None: by :func:`rouge`), and which tasks it fits."""

    compute: Callable[[list[Any], list[Any], int], float] | None
    task_types: tuple[str, ...]
    higher_is_better: bool = True


_CLASSES = ("classification",)
_NUMBERS = ("regression",)
_TEXTS = ("seq2seq", "causal")

METRICS = {
    "accuracy": MetricSpec(accuracy, _CLASSES),
    "f1": MetricSpec(f1, _CLASSES),
    "matthews_correlation": MetricSpec(matthews_correlation, _CLASSES),
    "pearson": MetricSpec(pearson, _NUMBERS),
    "spearman": MetricSpec(spearman, _NUMBERS),
    "rouge1": MetricSpec(None, _TEXTS),
    "rouge2": MetricSpec(None, _TEXTS),
    "rougeL": MetricSpec(None, _TEXTS),
}


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
    names: Sequence[str], predictions: list[Any], references: list[Any], *, num_labels: int = 0
) -> dict[str, float]:
    """The named metrics, in the order of ``names``.

    Args:
        names: metrics that fit one task type.
        predictions: N class ids, numbers or texts.
        references: N of the same kind.
        num_labels: number of classes; decides between binary and macro F1.
    """
    assert len(predictions) == len(references) > 0, (len(predictions), len(references))
    results: dict[str, float] = {}
    for name in names:
        compute = METRICS[name].compute
        if compute is not None:
            results[name] = compute(predictions, references, num_labels)
    rouge_names = [name for name in names if METRICS[name].compute is None]
    if rouge_names:
        results |= rouge(rouge_names, predictions, references)
    return {name: results[name] for name in names}
