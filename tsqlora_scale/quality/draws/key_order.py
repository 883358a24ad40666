"""The largest keys of a pool, and parts of the order of its keys, without sorting it whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from tsqlora_scale.common.disk_arrays import BLOCK, blocks, new_array
from tsqlora_scale.common.random_streams import uniform

#: Bins that :class:`Order` counts keys in, as a power of two, and samples that it sorts at once.
BITS, WINDOW = 20, 2 * BLOCK
#: Counters that :func:`largest` has in all strata together, as a power of two: few enough for small pools, too.
COUNTERS = 16


def stratum_of(strata: np.ndarray | None, block: slice) -> np.ndarray:
    """The strata of a block of samples, int64; None is one stratum of all."""
    size = block.stop - block.start
    return np.zeros(size, dtype=np.int64) if strata is None else strata[block].astype(np.int64)


def descending(keys: np.ndarray) -> np.ndarray:
    """Numbers (n,) uint64 that sort upwards as the floats ``keys`` sort downwards, and are equal where they are."""
    bits = (np.asarray(keys, dtype=np.float64) + 0.0).view(np.uint64)  # -0.0 is 0.0
    return np.where(bits >> np.uint64(63), bits, bits ^ np.uint64(2**63 - 1))


def largest(
    keys: np.ndarray,
    quota: np.ndarray,
    strata: np.ndarray | None = None,
    *,
    ties: np.random.Generator | None = None,
) -> np.ndarray:
    """Which are among the ``quota[s]`` largest keys of their stratum s, (n,) bool; of equal ones the earlier.

    A radix selection finds the last key that belongs, some of its leading bits in every pass over the keys. Memory:
    :data:`COUNTERS` and some blocks.

    Args:
        keys: (n,), no NaN.
        quota: samples to take in every stratum, no more than it has.
        strata: the stratum of each sample, (n,); None is one.
        ties: draws among equal keys in the place of the order.
    """
    last, left, equal = _last_keys(keys, quota, strata)
    if ties is None or not ((left > 0) & (left < equal)).any():
        return _members(keys, last, left, strata)
    chances = uniform(ties, len(keys))
    for block in blocks(len(keys)):
        differ = descending(keys[block]) != last[stratum_of(strata, block)]
        chances[block][differ] = -np.inf
    member = largest(chances, left, strata)
    for block in blocks(len(keys)):
        member[block] |= descending(keys[block]) < last[stratum_of(strata, block)]
    return member


def _last_keys(
    keys: np.ndarray, quota: np.ndarray, strata: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every stratum the last key that belongs, as :func:`descending` numbers it, how many that are equal to it
    belong, and how many there are."""
    groups = np.arange(len(quota))
    width = max(COUNTERS - (len(quota) - 1).bit_length(), 4)
    last = np.zeros(len(quota), dtype=np.uint64)  # the leading bits known of the last key that belongs
    left = np.array(quota, dtype=np.int64)  # to take among the keys with these bits
    known = 0
    while known < 64:
        width = min(width, 64 - known)
        counters = np.zeros((len(quota), 2**width), dtype=np.int64)
        for block in blocks(len(keys)):
            numbers, group = descending(keys[block]), stratum_of(strata, block)
            if known:
                open_ = numbers >> np.uint64(64 - known) == last[group]
                numbers, group = numbers[open_], group[open_]
            digit = (numbers >> np.uint64(64 - known - width)).astype(np.int64) & (2**width - 1)
            counters += np.bincount(group * 2**width + digit, minlength=counters.size).reshape(counters.shape)
        sums = counters.cumsum(axis=1)
        digit = (sums < left[:, None]).sum(axis=1)
        left -= np.where(digit > 0, sums[groups, digit - 1], 0)
        last = (last << np.uint64(width)) | digit.astype(np.uint64)
        known += width
    return last, left, counters[groups, digit]


def smallest(keys: np.ndarray, count: int) -> np.ndarray:
    """Which are among the ``count`` smallest keys, (n,) bool; of equal ones the earlier. Overwrites ``keys``."""
    return largest(np.negative(keys, out=keys), np.array([count]))


def _members(keys: np.ndarray, last: np.ndarray, left: np.ndarray, strata: np.ndarray | None) -> np.ndarray:
    """Keys before ``last`` of their stratum, and the first ``left`` of those that are equal to it."""
    member = new_array(len(keys), bool)
    for block in blocks(len(keys)):
        numbers, group = descending(keys[block]), stratum_of(strata, block)
        member[block] = numbers < last[group]
        equal = np.flatnonzero(numbers == last[group])
        equal = equal[np.argsort(group[equal], kind="stable")]
        found = np.bincount(group[equal], minlength=len(left))
        place = np.arange(len(equal)) - (np.cumsum(found) - found)[group[equal]]
        member[block.start + equal[place < left[group[equal]]]] = True
        left = np.maximum(left - found, 0)
    return member


class Order:
    """``argsort(-keys, kind="stable")``, a stretch at a time.

    Up to :data:`WINDOW` keys are sorted at once. Of more, the keys are counted in one pass, in bins of one width from
    the largest to the smallest of the first block; a stretch that is asked for is then collected in another and sorted.
    Stretches hold about :data:`WINDOW` samples, more only where one bin has more whose keys are not ``-inf``.

    Args:
        size: number of keys.
        keys: gives them, block by block in order, the same at every call; no NaN.
    """

    def __init__(self, size: int, keys: Callable[[], Iterable[np.ndarray]]) -> None:
        self.size = size
        self._keys = keys
        self._start = 0
        self._window = np.empty(0, dtype=np.int64)
        if size <= WINDOW:
            self._window = np.argsort(np.concatenate([descending(block) for block in keys()]), kind="stable")
            return
        self._last = 2**BITS - 1  # the bin of -inf and of nothing else
        first = next(iter(keys()))
        finite = first[np.isfinite(first)]
        self._high = float(finite.max()) if len(finite) else 0.0
        with np.errstate(over="ignore"):
            scale = self._last / ((self._high - finite.min(initial=self._high)) or 1.0)
        self._scale = float(np.clip(scale, np.finfo(float).tiny, np.finfo(float).max))  # no product is 0 times inf
        found = np.zeros(2**BITS, dtype=np.int64)
        for block in keys():
            found += np.bincount(self._bins(block), minlength=len(found))
        self._ends = found.cumsum()

    def part(self, start: int, stop: int) -> np.ndarray:
        """Places [start, stop) of the order, or the first of them; at least one."""
        assert 0 <= start < min(stop, self.size), (start, stop)
        if not self._start <= start < self._start + len(self._window):
            self._collect(start)
        part: np.ndarray = self._window[start - self._start : stop - self._start]
        return part

    def _bins(self, keys: np.ndarray) -> np.ndarray:
        """Numbers (n,) of bins, no smaller where a key is smaller: every operation rounds monotonically."""
        with np.errstate(over="ignore"):
            bins: np.ndarray = np.clip((self._high - keys) * self._scale, 0, self._last - 1).astype(np.int64)
        bins[keys == -np.inf] = self._last
        return bins

    def _collect(self, place: int) -> None:
        """Sort the window that begins with the bin of ``place``."""
        first = int(np.searchsorted(self._ends, place, side="right"))
        start = int(self._ends[first - 1]) if first else 0
        if first == self._last:
            self._collect_last(start + (place - start) // WINDOW * WINDOW, start)
            return
        last = max(int(np.searchsorted(self._ends, start + WINDOW, side="right")) - 1, first)
        held, found, begin = [], [], 0
        for block in self._keys():
            bins = self._bins(block)
            inside = np.flatnonzero((bins >= first) & (bins <= last))
            held.append(inside + begin)
            found.append(descending(block[inside]))
            begin += len(block)
        self._start = start
        self._window = np.concatenate(held)[np.argsort(np.concatenate(found), kind="stable")]

    def _collect_last(self, start: int, begin: int) -> None:
        """The window from place ``start`` of samples whose keys are ``-inf``; they begin at ``begin``, as they come."""
        held, place, sample = [], begin, 0
        for block in self._keys():
            inside = np.flatnonzero(block == -np.inf)
            held.append(inside[max(start - place, 0) : max(start + WINDOW - place, 0)] + sample)
            place += len(inside)
            sample += len(block)
        self._start = start
        self._window = np.concatenate(held)
