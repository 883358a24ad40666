"""ROUGE: overlap of generated and reference text in words (1), pairs of words (2), longest common subsequence (L)."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer


class Rouge(evaluate.Metric):
    """``rouge1``, ``rouge2``, ``rougeL``: F-measures in [0, 1], Porter stemmer on, mean over samples."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="ROUGE F-measures with stemming (Lin 2004).",
            citation="",
            inputs_description="predictions, references: texts. rouge_types: which measures.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self, predictions: list[str], references: list[str], rouge_types: Sequence[str] = ("rouge1", "rouge2", "rougeL")
    ) -> dict[str, float]:
        scorer = RougeScorer(list(rouge_types), use_stemmer=True)
        scores = [scorer.score(target, text) for target, text in zip(references, predictions, strict=True)]
        return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in rouge_types}
