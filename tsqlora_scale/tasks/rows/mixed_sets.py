"""Of which data set of a mixture every sample is, and what share of the draws each set is to have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np

from tsqlora_scale.common.disk_arrays import blocks, counted, new_array
from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.rows.set_columns import DATA_SET, ROW_WEIGHT

#: What the rows of ``task.query`` are called beside the sets.
QUERY_SET = "query"
#: Rows that are in memory at once.
_ROWS = 2**18


def asked_shares(
    sizes: np.ndarray, weights: Sequence[float] | None = None, temperature: float | None = None
) -> np.ndarray:
    """Shares of the draws (K,), which add up to 1: by weights, or by the sets' sizes to the power of 1 / temperature.

    Args:
        sizes: rows of the sets, (K,), of each at least one.
        weights: of the sets, above 0. Without both, shares are as the sizes.
    """
    logs = np.log(sizes if weights is None else np.asarray(weights, dtype=np.float64))
    logs = logs / (temperature if temperature is not None and weights is None else 1.0)
    powers = np.exp(logs - logs.max())  # of a low temperature the powers themselves may be too large
    shares: np.ndarray = powers / powers.sum()
    return shares


@dataclass(frozen=True)
class MixedSets:
    """The sets of a mixture in a pool of N samples.

    Attributes:
        names: of the sets in the config's order, K of them; where the query's rows have joined the pool, ``query``
            behind them.
        numbers: the place in ``names`` of every sample's set, (N,) int16.
        shares: of the draws from the sets, (K,), as they are asked for; None: none are, and draws are as rows are.
    """

    names: tuple[str, ...]
    numbers: np.ndarray
    shares: np.ndarray | None

    @classmethod
    def in_pool(cls, cfg: TaskConfig, pool: datasets.Dataset) -> MixedSets | None:
        """Those of a pool; None without a mixture."""
        if not cfg.mixture or DATA_SET not in pool.column_names:
            return None
        numbers = _column(pool, DATA_SET, np.int16)
        names = [each.name for each in cfg.mixture]
        sizes = np.bincount(numbers, minlength=len(names))
        if len(sizes) > len(names):
            names.append(QUERY_SET)
        shares = None
        if cfg.asks_for_shares and len(pool):
            weights = [each.weight for each in cfg.mixture if each.weight is not None]
            shares = asked_shares(sizes[: len(cfg.mixture)], weights or None, cfg.temperature)
        return cls(tuple(names), numbers, shares)

    def sizes(self) -> np.ndarray:
        """Samples of every set, (len(names),) int64."""
        found = np.zeros(len(self.names), dtype=np.int64)
        for block in blocks(len(self.numbers)):
            found += np.bincount(self.numbers[block], minlength=len(self.names))
        return found

    def counts(self, rows: np.ndarray) -> np.ndarray:
        """How many of ``rows`` are of each set, (len(names),) int64."""
        found: np.ndarray = np.bincount(self.numbers[rows], minlength=len(self.names))
        return found

    def within(self, classes: np.ndarray | None) -> np.ndarray:
        """Numbers (N,) int32 of the pairs of set and class, from 0; of the sets alone without ``classes`` (N,)."""
        pairs = new_array(len(self.numbers), np.int32)
        count = 1 if classes is None else int(classes.max(initial=0)) + 1
        for block in blocks(len(pairs)):
            pairs[block] = self.numbers[block].astype(np.int32) * count
            if classes is not None:
                pairs[block] += classes[block]
        return pairs

    def draw_weights(self, pool: datasets.Dataset) -> np.ndarray | None:
        """What multiplies how often a sample is drawn, (N,) float64, so that every set gets its share; None: nothing.

        Within a set its rows' own weights decide. The mean over the samples of all sets is 1, as is the weight of the
        query's rows.
        """
        own = _column(pool, ROW_WEIGHT, np.float64) if ROW_WEIGHT in pool.column_names else None
        if own is None and self.shares is None:
            return None
        if own is None:
            own = new_array(len(self.numbers), np.float64)
            own[:] = 1.0
        sizes = self.sizes()[: self.count]
        shares = sizes / sizes.sum() if self.shares is None else self.shares
        factors = np.ones(len(self.names))
        factors[: self.count] = shares * sizes.sum() / self._sums(counted(len(own)), own)[: self.count]
        for block in blocks(len(own)):
            own[block] *= factors[self.numbers[block]]
        return own

    def balance(self, rows: np.ndarray, weights: np.ndarray) -> None:
        """Scale the weights (n,) by which ``rows`` are drawn, in place, so that the sets have their shares.

        The query's rows keep their weight, and all others together theirs. A set that has no weight among ``rows``
        leaves its share to the others. Nothing happens where no shares are asked for.
        """
        if self.shares is None:
            return
        sums = self._sums(rows, weights)[: self.count]
        wanted = np.where(sums > 0, self.shares, 0.0)
        if not wanted.any():
            return
        factors = np.ones(len(self.names))
        factors[: self.count] = wanted / wanted.sum() * sums.sum() / np.where(sums > 0, sums, 1.0)
        for block in blocks(len(rows)):
            weights[block] *= factors[self.numbers[rows[block]]]

    @property
    def count(self) -> int:
        """K, the query's rows being of no set."""
        return len(self.names) - (self.names[-1] == QUERY_SET)

    def _sums(self, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        sums = np.zeros(len(self.names))
        for block in blocks(len(rows)):
            sums += np.bincount(self.numbers[rows[block]], weights[block], minlength=len(self.names))
        return sums


def _column(pool: datasets.Dataset, name: str, kind: type) -> np.ndarray:
    view = pool.select_columns([name]).with_format("arrow")
    column = new_array(len(view), kind)
    for block in blocks(len(view), _ROWS):
        column[block] = view[block][name].to_numpy()
    return column
