"""Which data to learn from: per-sample quality scores, the subset they choose, and the batches drawn from it.

Paper 2.1, Eq. 1 and 2; Algorithm 1, lines 2, 4 and 9.
"""

from tsqlora_scale.quality.gradients import BatchLike, PerSampleGradients
from tsqlora_scale.quality.sampler import BatchSampler
from tsqlora_scale.quality.scorer import PassReport, QualityScorer
from tsqlora_scale.quality.select import importance_weights, select_subset
from tsqlora_scale.quality.sketch import Sketch
from tsqlora_scale.quality.table import ScoreTable

__all__ = [
    "BatchLike",
    "BatchSampler",
    "PassReport",
    "PerSampleGradients",
    "QualityScorer",
    "ScoreTable",
    "Sketch",
    "importance_weights",
    "select_subset",
]
