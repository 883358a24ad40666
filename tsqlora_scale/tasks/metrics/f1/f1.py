"""F1, the harmonic mean of precision and recall."""

import datasets
import evaluate
from sklearn.metrics import f1_score


class F1(evaluate.Metric):
    """``f1`` in [0, 1]: of class 1 for two classes, the unweighted (macro) mean over classes for more.

    A class that neither predictions nor references hold is left out of the mean; 0 where precision and recall
    are both undefined.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Harmonic mean of precision and recall.",
            citation="",
            inputs_description="predictions, references: class ids. num_labels: number of classes (2).",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int], num_labels: int = 2) -> dict[str, float]:
        average = "binary" if num_labels == 2 else "macro"
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0))}
