"""Which data to learn from: per-sample quality scores, the subset they choose, and the batches drawn from it.

Paper 2.1, Eq. 1 and 2; Algorithm 1, lines 2, 4 and 9.
"""

from tsqlora_scale.quality.draws.batch_sampler import BatchSampler
from tsqlora_scale.quality.draws.subset import importance_weights, select_subset
from tsqlora_scale.quality.gradients.per_sample import PerSampleGradients
from tsqlora_scale.quality.gradients.sketch import Sketch
from tsqlora_scale.quality.pool import BatchLike, Pool
from tsqlora_scale.quality.scores.score_table import ScoreTable
from tsqlora_scale.quality.scores.scorer import PassReport, QualityScorer

__all__ = [
    "BatchLike",
    "BatchSampler",
    "PassReport",
    "PerSampleGradients",
    "Pool",
    "QualityScorer",
    "ScoreTable",
    "Sketch",
    "importance_weights",
    "select_subset",
]
