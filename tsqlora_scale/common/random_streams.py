"""Every random stream of the package: functions of their names and counters, never of what was drawn before.

==========================  =====================================  =========================================
stream                      who draws from it                      depends on, beside ``run.seed``
==========================  =====================================  =========================================
``philox "draw"``           minibatches with replacement           the step
``philox "epoch from S"``   minibatches without replacement        the sampler's first step S, the epoch
``philox "select"``         the subset S, and a random part        nothing more
``philox "ties"``           samples of S among those rated alike   nothing more
``philox "subsample"``      ``scoring.max_samples``                nothing more
``philox "refresh"``        the share that a refresh scores        the pass
``philox "sketch/NAME"``    offset, pitch and signs of sketches    the parameter's name
``philox "input preview"``  rows that a reader is shown            nothing more
``philox "simhash"``        hyperplanes for similar gradients      the table
``philox "fitted to the pool"``  rows that features are compared on  nothing more
``philox "query folds"``    folds of the query                     nothing more
``philox "infobatch"``      samples that an epoch skips            the epoch's first step
``philox "dsir"``           Gumbel noise on texts' weights         nothing more
``philox "valuing rows"``   rows that value or judge the others    nothing more
``philox "mining NAME"``    neighbours, halves, subsets of a rule  the subset's number
``philox "round with the query"``  order of a redrawn subset       the round
``philox "evidence folds, SIDE"``  parts of pool and query       nothing more
``philox "feature projection"``  projection of wide features       nothing more
``philox "init samples"``   samples that factors start from        nothing more
``philox "folds"``          folds of an audit                      nothing more
``philox "audit features"`` rows that a regression learns from     nothing more
``philox "audit projection"`` projections of wide hidden states    the layer
``philox "advice rows"``     rows that advice looks at              nothing more
``philox "advice folds"``    parts of the query in trials           nothing more
``philox "paired differences"``  resamples of a bootstrap           nothing more
``philox "share on target"`` resamples of pool and query            nothing more
``philox "comparison"``      resamples and flips of a comparison    nothing more; seed 0
``philox "halves of SPLIT"``  the halves of a held-out set          nothing more; seed 0
``philox "noise model"``    rows that a noise model is fitted on   nothing more
``philox "demonstrations"``  rows that a prompt demonstrates        the class
``philox "label words"``    rows that label words are found by     the class
``generator_for`` "head"    a new head's weights                   nothing more
``generator_for`` "adapter" A of the adapted layers                nothing more
``generator_for`` "init directions"  where their search begins     nothing more
``generator_for`` "gradient sketch"  projections of gradients      the layer
``layer_generator``         rows of A of a layer that grows        the step, the layer
``seed_dropout``            dropout masks                          the step, the micro-batch's place
``subset_rows``             ``max_train_samples`` and the like     the split
``seed_libraries``          what libraries draw and we do not      nothing more
                            draw anew
==========================  =====================================  =========================================
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from tsqlora_scale.common.disk_arrays import new_array

if TYPE_CHECKING:
    import torch


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
    numbers = new_array(size, np.float64)
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


def generator_for(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator that depends on the seed and the purpose alone, the same on every rank."""
    import torch

    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def layer_generator(seed: int, step: int, layer: str) -> torch.Generator:
    """The generator of a layer's resize after ``step`` finished steps: the same on every process and every engine."""
    import torch

    digest = hashlib.sha256(f"resize/{seed}/{step}/{layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Seed the global generators, from which dropout draws: the CPU's, and those of the accelerators there are.

    Masks are a function of the step and the micro-batch's place in the global batch: a resumed run repeats them, and
    so does any number of ranks with the same micro_batch_size.
    """
    import torch

    digest = hashlib.sha256(f"{seed}/dropout/{step}/{micro_batch}".encode()).digest()
    value = int.from_bytes(digest[:8], "little") >> 1
    # Not torch.manual_seed: for every kind of accelerator that is absent it formats a stack, up to milliseconds a call.
    torch.default_generator.manual_seed(value)
    if torch.accelerator.is_available():
        kind = torch.get_device_module(torch.accelerator.current_accelerator())
        getattr(kind, "manual_seed_all", kind.manual_seed)(value)  # an Apple GPU is alone, and has no ..._all


def seed_libraries(seed: int) -> None:
    """Seed the global generator before a model is built, for whatever libraries draw and we do not draw anew."""
    import torch

    torch.manual_seed(seed)


def subset_rows(size: int, limit: int, *, seed: int, split: str) -> np.ndarray:
    """``limit`` of ``size`` rows of a split, drawn evenly, ascending. A smaller subset is part of a larger one."""
    generator = np.random.default_rng([seed, *f"{split} subset".encode()])
    return np.sort(generator.permutation(size)[:limit])


def half_rows(size: int, half: str, *, split: str) -> np.ndarray:
    """One of the two halves of a split's rows, ascending: ``report``, which has the odd row, or ``tuning``.

    The same for every seed, so that no run of a comparison is tuned on what another one reports.
    """
    order = philox(0, f"halves of {split}").permutation(size)
    return np.sort(order[: size // 2] if half == "tuning" else order[size // 2 :])
