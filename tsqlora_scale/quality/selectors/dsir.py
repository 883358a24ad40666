"""``sampling.selector: dsir``: importance weights of texts by hashed words and pairs of words.

Xie et al., *Data Selection for Language Models via Importance Resampling*, 2302.03169: words and pairs of neighbouring
words fall into 10,000 buckets; pool and query each are a bag of them; a text's weight is the ratio of its likelihoods,
and texts are drawn by their weights without replacement (Gumbel top-k). Counts are smoothed by one here, as their code
does for small targets: a query has few rows. Answers that are texts belong to the text, classes and numbers do not.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from tsqlora_scale.common.disk_arrays import blocks, new_array
from tsqlora_scale.common.random_streams import gumbel, philox
from tsqlora_scale.quality.pool import Pool
from tsqlora_scale.quality.selectors.ranked import RankedSelector, Rating

#: Buckets, and texts that are in memory at once.
BUCKETS, ROWS = 10_000, 2**14
_WORDS = re.compile(r"\w+|[^\w\s]+")


class DsirSelector(RankedSelector):
    """Draws texts by how much likelier the query's words make them than the pool's. No model is looked at."""

    def rate(self, module: nn.Module) -> Rating:
        """Two looks at all texts."""
        weights = self.context.world.from_main(self._log_weights)
        noise = gumbel(philox(self.config.run.seed, "dsir"), len(weights))
        return Rating(weights + noise, terms={"log_weight": weights})

    def _log_weights(self) -> np.ndarray:
        query = self.pool.query
        assert query is not None, "needs a query"
        wanted, common = np.zeros(BUCKETS, dtype=np.int64), np.zeros(BUCKETS, dtype=np.int64)
        for _, found in _buckets(query, len(query)):
            wanted += np.bincount(np.concatenate(found), minlength=BUCKETS)
        for _, found in _buckets(self.pool, self.choices):
            common += np.bincount(np.concatenate(found), minlength=BUCKETS)
        ratio = log_ratio(wanted, common)
        weights = new_array(len(self.pool), np.float64)
        for block, found in _buckets(self.pool, len(self.pool)):
            weights[block] = [ratio[places].sum() for places in found]
        return weights


def _buckets(pool: Pool[Any], size: int) -> Iterator[tuple[slice, list[np.ndarray]]]:
    for block in blocks(size, ROWS):
        texts = pool.texts(np.arange(block.start, block.stop))
        yield block, [hashed(" ".join(parts)) for parts in texts]


def hashed(text: str) -> np.ndarray:
    """Buckets of a text's words and pairs of words, one each for every occurrence, int64."""
    words = _WORDS.findall(text.lower())
    grams: Sequence[str] = [*words, *(" ".join(pair) for pair in pairwise(words))]
    return np.array([zlib.crc32(gram.encode()) % BUCKETS for gram in grams], dtype=np.int64)


def log_ratio(wanted: np.ndarray, common: np.ndarray) -> np.ndarray:
    """Log ratio of the buckets' probabilities in query and pool, of their counts, smoothed by one."""
    of_query, of_pool = wanted + 1.0, common + 1.0
    ratio: np.ndarray = np.log(of_query / of_query.sum()) - np.log(of_pool / of_pool.sum())
    return ratio
