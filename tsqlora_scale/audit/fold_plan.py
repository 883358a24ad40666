"""Which fold each sample is in: labels evenly, and samples that are nearly the same together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from tsqlora_scale.common.random_streams import philox


def copy_groups(pairs: np.ndarray, size: int) -> np.ndarray:
    """The first sample of each sample's group, (size,) int64: samples that a chain of ``pairs`` (m, 2) links.

    A sample without a pair is its own group's first.
    """
    first = np.arange(size)

    def root(sample: int) -> int:
        while first[sample] != sample:
            first[sample] = first[first[sample]]
            sample = int(first[sample])
        return sample

    for one, other in pairs.tolist():
        low, high = sorted((root(one), root(other)))
        first[high] = low
    return np.array([root(sample) for sample in range(size)], dtype=np.int64)


def same_texts(texts: Iterable[str]) -> np.ndarray:
    """Pairs (m, 2) of samples, i < j, whose texts are the same but for case and spaces: each with the first of them."""
    first: dict[bytes, int] = {}
    pairs = []
    for number, text in enumerate(texts):
        if (before := first.setdefault(text_key(text), number)) != number:
            pairs.append((before, number))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def text_key(text: str) -> bytes:
    """What texts have in common that are the same but for case and spaces, 32 bytes."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass")).digest()


def plan_folds(groups: np.ndarray, strata: np.ndarray | None, folds: int, *, seed: int) -> np.ndarray:
    """The fold of every sample, (n,) int64: whole groups, every stratum spread as evenly as its groups allow.

    Groups are dealt in random order, large ones first, each to the fold that has the fewest samples of its first
    sample's stratum, and of those to one with the fewest samples.

    Args:
        groups: the group of every sample, (n,): what belongs into one fold. See :func:`copy_groups`.
        strata: the class of every sample, (n,) numbers from 0; None: all alike.
        folds: 2 or more.
    """
    size = len(groups)
    strata = np.zeros(size, dtype=np.int64) if strata is None else np.asarray(strata)
    leaders, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.lexsort((philox(seed, "folds").random(len(leaders)), -sizes))
    of_stratum = np.zeros((int(strata.max(initial=0)) + 1, folds), dtype=np.int64)
    in_all = np.zeros(folds, dtype=np.int64)
    chosen = np.zeros(len(leaders), dtype=np.int64)
    for group in order.tolist():
        stratum, count = strata[leaders[group]], sizes[group]
        fold = int(np.lexsort((np.arange(folds), in_all, of_stratum[stratum]))[0])
        chosen[group] = fold
        of_stratum[stratum, fold] += count
        in_all[fold] += count
    folds_of: np.ndarray = chosen[members]
    return folds_of
