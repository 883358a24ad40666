"""Which samples are copies of one another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np


def text_groups(texts: Iterable[Sequence[str]], *, exact: bool = False) -> np.ndarray:
    """The number of every sample's group, (n,) int64: of samples, each of one text or more, that are the same but for
    case and spaces; ``exact``: to the letter, so that a model makes the same of them."""
    keys = [int.from_bytes(text_key(*parts, exact=exact)[:8], "little") for parts in texts]
    groups: np.ndarray = np.unique(np.array(keys, dtype=np.uint64), return_inverse=True)[1]
    return groups


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


def text_key(*parts: str, exact: bool = False) -> bytes:
    """What samples of one text or more have in common that are the same but for case and spaces, 32 bytes; ``exact``:
    to the letter."""
    text = "\0".join(part if exact else " ".join(part.casefold().split()) for part in parts)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
