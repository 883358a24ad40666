"""Samples that teach the same: their gradients point the same way, seen through the sketches of a scoring pass."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from tsqlora_scale.common.random_streams import philox

#: Below this number all pairs are compared; above, those that fall into one bucket of some hash table.
ALL_PAIRS = 20_000
TABLES = 8
#: rows of one block of the product of all pairs
BLOCK = 2048
#: By which the cosine of a vector with itself may miss 1, in float32.
ROUNDING = 1e-6


def similar_pairs(sketches: np.ndarray, threshold: float, *, seed: int = 0) -> np.ndarray:
    """Pairs (m, 2), i < j, sorted, of samples whose gradients have a cosine of at least ``threshold``.

    Up to :data:`ALL_PAIRS` samples every pair is compared. Above that, pairs that share a bucket in one of
    :data:`TABLES` tables of random hyperplanes (SimHash, Charikar 2002): of pairs with cosine 0.95 and 1e6 samples
    about 97 % are found, of identical ones all. Rows that are zero or not finite are like nothing.

    Args:
        sketches: (n, dim).
    """
    usable, units = _directions(sketches)
    found = [np.empty((0, 2), np.int64)]
    for bucket in _buckets(units, seed):
        for rows, columns, near in _near(units, bucket, threshold):
            i, j = np.nonzero(near)
            found.append(usable[np.column_stack([rows[i], columns[j]])])
    pairs: np.ndarray = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    return pairs


def linked(sketches: np.ndarray, threshold: float, *, seed: int = 0) -> np.ndarray:
    """The first sample of each one's group, (n,) int64: of samples that a chain of :func:`similar_pairs` links, whose
    pairs are never there at once."""
    usable, units = _directions(sketches)
    first = np.arange(len(units))
    for bucket in _buckets(units, seed):
        for rows, columns, near in _near(units, bucket, threshold):
            for place in np.flatnonzero(near.any(1)).tolist():
                _link(first, rows[place], columns[near[place]])
    found = np.arange(len(sketches))
    found[usable] = usable[_roots(first, np.arange(len(first)))]
    return found


def _link(first: np.ndarray, row: np.int64, others: np.ndarray) -> None:
    """Make one group of those of ``row`` and of ``others`` (k,), in place: each sample names one before it."""
    roots = np.unique(_roots(first, np.append(others, row)))
    first[roots] = roots[0]
    first[others] = roots[0]


def _roots(first: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """The first of the groups of ``samples`` (k,)."""
    roots: np.ndarray = first[samples]
    while not np.array_equal(above := first[roots], roots):
        roots = above
    return roots


def count_similar(sketches: np.ndarray, threshold: float, *, seed: int = 0) -> np.ndarray:
    """Number of samples that each is like, itself included, (n,): :func:`neighbours` of :func:`similar_pairs`, whose
    pairs, half of n^2 where all samples are alike, are never there at once."""
    usable, units = _directions(sketches)
    counts = np.ones(len(units), dtype=np.int64)
    codes = _codes(units, seed)
    for table, code in enumerate(codes):
        for bucket in _same(code):
            for rows, columns, near in _near(units, bucket, threshold):
                for earlier in codes[:table]:  # which has counted the pair
                    near &= earlier[rows][:, None] != earlier[columns][None]
                counts[rows] += near.sum(1)
                counts[columns] += near.sum(0)
    found = np.ones(len(sketches), dtype=np.int64)
    found[usable] = counts
    return found


def _near(units: np.ndarray, bucket: np.ndarray, threshold: float) -> Iterator[tuple[np.ndarray, ...]]:
    """Blocks of rows (k,) and columns (l,) of a bucket, and which of their pairs are alike (k, l); every pair once."""
    threshold = min(threshold, 1 - ROUNDING)
    for start in range(0, len(bucket), BLOCK):
        rows = bucket[start : start + BLOCK]
        for other in range(start, len(bucket), BLOCK):
            columns = bucket[other : other + BLOCK]
            near = units[rows] @ units[columns].T >= threshold
            yield rows, columns, np.triu(near, 1) if other == start else near


def _directions(sketches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are finite and not zero, and their unit vectors, float32."""
    lengths = np.linalg.norm(sketches, axis=1)
    usable = np.flatnonzero(np.isfinite(lengths) & (lengths > 0))
    units = (sketches[usable] / lengths[usable, None]).astype(np.float32)
    return usable, units


def _buckets(units: np.ndarray, seed: int) -> list[np.ndarray]:
    """Groups of row numbers, each sorted; together they hold the candidates."""
    return [bucket for codes in _codes(units, seed) for bucket in _same(codes)]


def _codes(units: np.ndarray, seed: int) -> list[np.ndarray]:
    """The bucket of every row, (n,), in every table; of few rows one of them all."""
    if len(units) <= ALL_PAIRS:
        return [np.zeros(len(units), dtype=np.int64)]
    bits = math.ceil(math.log2(len(units) / ALL_PAIRS)) + 4
    planes = (philox(seed, "simhash", table).standard_normal((units.shape[1], bits)) for table in range(TABLES))
    return [(units @ each.astype(np.float32) > 0) @ (1 << np.arange(bits)) for each in planes]


def _same(codes: np.ndarray) -> list[np.ndarray]:
    """The rows of each bucket that has several, sorted."""
    order = np.argsort(codes, kind="stable")
    ends = np.flatnonzero(np.diff(codes[order])) + 1
    return [group for group in np.split(order, ends) if len(group) > 1]


def neighbours(pairs: np.ndarray, size: int) -> np.ndarray:
    """Number of samples that each of ``size`` is like, itself included, (size,)."""
    counts: np.ndarray = 1 + np.bincount(pairs.reshape(-1), minlength=size)
    return counts


def groups(pairs: np.ndarray) -> list[np.ndarray]:
    """Samples that are like the first of their group, largest groups first; each sample is in one group at most.

    Leaders are taken by the number of samples that they are like: a chain of pairs does not become one group.
    """
    if len(pairs) == 0:
        return []
    both = np.concatenate([pairs, pairs[:, ::-1]])
    both = both[np.lexsort((both[:, 1], both[:, 0]))]
    leaders, starts, counts = np.unique(both[:, 0], return_index=True, return_counts=True)
    taken: set[int] = set()
    made = []
    for k in np.argsort(-counts, kind="stable"):
        leader = int(leaders[k])
        if leader in taken:
            continue
        like = [int(i) for i in both[starts[k] : starts[k] + counts[k], 1] if int(i) not in taken]
        if like:
            taken.update([leader, *like])
            made.append(np.array([leader, *like]))
    return sorted(made, key=lambda group: (-len(group), group[0]))
