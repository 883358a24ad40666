"""Counter-based random streams: a function of their name and counter, never of what was drawn before."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import numpy as np

from tsqlora_scale.common.disk_arrays import allocate


def philox(seed: int, purpose: str, counter: int = 0) -> np.random.Generator:
    """The generator of ``(seed, purpose, counter)``, the same on every rank and machine.

    ``seed`` and ``purpose`` make Philox's key, ``counter`` its two high counter words, so streams of different
    counters are 2**128 blocks apart and never overlap.
    """
    assert counter >= 0, counter
    digest = hashlib.sha256(f"{purpose}\0{seed}".encode()).digest()
    words = np.array([0, 0, counter & (2**64 - 1), counter >> 64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64), counter=words))


def uniform(generator: np.random.Generator, size: int) -> np.ndarray:
    """Uniform numbers from [0, 1), a column (size,) float64."""
    numbers = allocate(size, np.float64)
    generator.random(out=numbers)
    return numbers


def gumbel(generator: np.random.Generator, size: int) -> np.ndarray:
    """Standard Gumbel noise, a column (size,) float64, by inversion (so it needs uniform doubles alone)."""
    numbers = uniform(generator, size)
    np.clip(numbers, np.finfo(np.float64).tiny, None, out=numbers)
    for _ in range(2):
        np.log(numbers, out=numbers)
        np.negative(numbers, out=numbers)
    return numbers


def share_of(fraction: float, total: int) -> int:
    """``ceil(fraction * total)`` with the fraction as written: 0.07 of 100 is 7, though 0.07 * 100 > 7 in floats."""
    return math.ceil(Fraction(repr(float(fraction))) * total)
