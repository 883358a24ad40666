"""The metrics that tasks report, each a local ``evaluate`` module: no hub, no download, no shared cache.

Every metric is a fraction, in [0, 1] or [-1, 1], as ``evaluate`` and scikit-learn give it; papers print the
same numbers times 100. ROUGE too: one scale for all, so that a report can treat them alike.
"""

from __future__ import annotations

import difflib
import importlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tsqlora_scale.common.errors import UserError


@dataclass(frozen=True)
class MetricSpec:
    """Where a metric is computed (``metrics/<module>/<module>.py``) and which tasks it fits."""

    module: str
    task_types: tuple[str, ...]
    higher_is_better: bool = True


_CLASSES = ("classification",)
_NUMBERS = ("regression",)
_TEXTS = ("seq2seq", "causal")

METRICS = {
    "accuracy": MetricSpec("accuracy", _CLASSES),
    "f1": MetricSpec("f1", _CLASSES),
    "matthews_correlation": MetricSpec("matthews_correlation", _CLASSES),
    "pearson": MetricSpec("pearson", _NUMBERS),
    "spearman": MetricSpec("spearman", _NUMBERS),
    "rouge1": MetricSpec("rouge", _TEXTS),
    "rouge2": MetricSpec("rouge", _TEXTS),
    "rougeL": MetricSpec("rouge", _TEXTS),
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
    for module in dict.fromkeys(METRICS[name].module for name in names):
        options: dict[str, Any] = {}
        if module == "rouge":  # all its measures in one pass
            options["rouge_types"] = [name for name in names if METRICS[name].module == module]
        elif module == "f1":
            options["num_labels"] = num_labels
        results |= _compute(module, predictions, references, options)
    return {name: results[name] for name in names}


def _compute(module: str, predictions: list[Any], references: list[Any], options: dict[str, Any]) -> dict[str, float]:
    """One ``evaluate.Metric``, in memory.

    The class is instantiated from its module, not through ``evaluate.load``: that copies the module into a
    cache shared by all processes and counts its use on a server. The temporary folder stays empty: a metric
    makes a folder when it is built, and a home that is read-only or shared is no place for it.
    """
    import evaluate

    code = importlib.import_module(f"{__name__}.{module}.{module}")
    (metric_class,) = (
        value
        for value in vars(code).values()
        if isinstance(value, type) and issubclass(value, evaluate.Metric) and value.__module__ == code.__name__
    )
    with tempfile.TemporaryDirectory() as folder:
        metric = metric_class(keep_in_memory=True, cache_dir=folder)
        result: dict[str, float] = metric.compute(predictions=predictions, references=references, **options)
    return result
