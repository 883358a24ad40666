"""Pearson's linear correlation of predicted and true values."""

import warnings

import datasets
import evaluate
from scipy.stats import pearsonr


class Pearson(evaluate.Metric):
    """``pearson`` in [-1, 1]; 0 where predictions or references are all equal."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Pearson's linear correlation coefficient.",
            citation="",
            inputs_description="predictions, references: numbers.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        if len(set(predictions)) < 2 or len(set(references)) < 2:
            return {"pearson": 0.0}
        with warnings.catch_warnings():  # values that differ in the last digits only
            warnings.simplefilter("ignore")
            return {"pearson": float(pearsonr(predictions, references).statistic)}
