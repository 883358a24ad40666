"""The ends of a ranking of a pool's samples, each compared with those of its own label."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tsqlora_scale.common.disk_arrays import blocks
from tsqlora_scale.quality.draws.key_order import stratum_of


class _Found(NamedTuple):
    """Samples that may be among the lowest of their stratum, (n,) each."""

    places: np.ndarray
    values: np.ndarray
    strata: np.ndarray


def lowest(
    values: np.ndarray, member: np.ndarray, strata: np.ndarray | None, count: int, *, sign: int = 1
) -> np.ndarray:
    """The ``count`` members with the lowest quantiles within their strata, the lowest first; places in the pool, int64.

    Terms are not comparable between classes: the gradients of one, as a whole, agree less with the pool's mean than
    those of another. Ranked over the pool, the lowest are a class; ranked within it, they are its odd ones. Every
    stratum has as large a share of the lowest as it has of the members.

    Args:
        values: (N,), float; NaN comes last.
        member: which samples are ranked, (N,) bool.
        strata: the stratum of each, (N,), numbers from 0; None is one stratum: the members with the lowest values.
        count: more than there are members gives all.
        sign: -1 ranks from the highest down.
    """
    sizes = np.zeros(0, dtype=np.int64)
    found = _Found(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))
    for part in _parts(values, member, strata, sign):
        more = np.bincount(part.strata)
        sizes = np.pad(sizes, (0, max(0, len(more) - len(sizes))))
        sizes[: len(more)] += more
        ranks, ordered = _ranked(_Found(*map(np.concatenate, zip(found, part, strict=True))))
        found = _Found(*(column[ranks < count] for column in ordered))
    ranks, ordered = _ranked(found)
    quantiles = (ranks + 0.5) / np.maximum(sizes, 1)[ordered.strata]
    best: np.ndarray = ordered.places[np.lexsort((ordered.places, ordered.values, quantiles))[:count]]
    return best


def _parts(values: np.ndarray, member: np.ndarray, strata: np.ndarray | None, sign: int) -> Iterator[_Found]:
    for block in blocks(len(values)):
        inside = np.flatnonzero(member[block])
        groups = stratum_of(strata, block)[inside].astype(np.int64)
        yield _Found(block.start + inside, sign * values[block][inside], groups)


def _ranked(found: _Found) -> tuple[np.ndarray, _Found]:
    """Everyone's rank within its stratum, from 0, and the samples in that order."""
    order = np.lexsort((found.places, found.values, found.strata))
    ordered = _Found(*(column[order] for column in found))
    first = np.searchsorted(ordered.strata, ordered.strata)
    return np.arange(len(order)) - first, ordered
