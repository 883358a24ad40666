"""Minibatches of S as a pure function of the step (Algorithm 1, lines 4 and 9)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from tsqlora_scale.common.disk_arrays import blocks
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.random_streams import gumbel, philox
from tsqlora_scale.quality.draws.dyadic import DyadicClasses
from tsqlora_scale.quality.draws.key_order import Order


class BatchSampler:
    """Draws the global batch of every optimizer step.

    ``draw(step)`` depends on the arguments below and the step alone, through a counter-based generator. So every
    rank draws the same global batch and takes its slice of it, the number of ranks changes nothing, and a resumed
    run continues exactly, in any order of calls.

    Args:
        indices: pool indices of S, (n,).
        probabilities: weights of these samples, (n,), nonnegative, of any positive sum; None is uniform.
        batch_size: samples per optimizer step.
        seed: of the run.
        replacement: with it every draw is independent. Without it the draws are slices of one order of S per epoch,
            each sample once per epoch; weighted, an epoch's order is one of successive weighted draws from what is
            left, so heavy samples tend to come early. A batch may straddle epochs.
        start: the step from which on this sampler draws. Another sampler of the same seed that takes over later
            uses other random numbers, and begins another epoch.
    """

    def __init__(
        self,
        indices: np.ndarray,
        probabilities: np.ndarray | None,
        *,
        batch_size: int,
        seed: int,
        replacement: bool,
        start: int = 0,
    ) -> None:
        self.indices = np.asarray(indices, dtype=np.int64)
        self.weights = None if probabilities is None else np.asarray(probabilities, dtype=np.float64)
        self.batch_size = batch_size
        self.seed = seed
        self.replacement = replacement
        self.start = start
        assert self.indices.ndim == 1
        assert len(self.indices) > 0
        assert batch_size > 0
        self._classes: DyadicClasses | None = None
        self._orders: dict[int, Order] = {}
        if self.weights is not None:
            assert self.weights.shape == self.indices.shape, "one weight per index"
            assert all(np.isfinite(self.weights[block]).all() for block in blocks(len(self.weights)))
            assert self.weights.min() >= 0
            assert self.weights.sum() > 0
            if replacement:
                self._classes = DyadicClasses(self.weights)

    def draw(self, step: int) -> np.ndarray:
        """Pool indices (batch_size,) of optimizer step ``step`` (from ``start``) of the run."""
        return self.ahead(step)

    def ahead(self, step: int) -> np.ndarray:
        """What :meth:`draw` gives, asked before the step's turn."""
        assert step >= self.start, (step, self.start)
        if self.replacement:
            generator = philox(self.seed, "draw", step)
            if self._classes is None:
                uniform = generator.random(self.batch_size)
                places = (uniform * len(self.indices)).astype(np.int64).clip(max=len(self.indices) - 1)
            else:
                places = self._classes.draw(generator, self.batch_size)
        else:
            places = self._slice((step - self.start) * self.batch_size, (step - self.start + 1) * self.batch_size)
        drawn: np.ndarray = self.indices[places]
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """What the draws depend on; there is no position to keep."""
        return {
            "fingerprint": self.fingerprint(),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "replacement": self.replacement,
            "start": self.start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that this sampler continues the one that was saved.

        Raises:
            UserError: its samples, weights or settings differ.
        """
        for key, value in self.state_dict().items():
            if state.get(key) == value:
                continue
            if key == "fingerprint":
                raise UserError(
                    "the checkpoint was written with other samples or other weights than the present ones; "
                    "resume with the same data, sampling.* and scoring.* as the run that wrote it"
                )
            raise UserError(
                f"the checkpoint's sampler had {key}={state.get(key)!r}, this run has {value!r}; "
                "resume with the config of the run that wrote it"
            )

    def fingerprint(self) -> str:
        """Digest of indices and weights, to the bit."""
        digest = hashlib.sha256(np.ascontiguousarray(self.indices).data)
        digest.update(b"uniform" if self.weights is None else np.ascontiguousarray(self.weights).data)
        return digest.hexdigest()

    def _slice(self, start: int, stop: int) -> np.ndarray:
        """Positions in S at places [start, stop) of the endless sequence of epochs."""
        size = len(self.indices)
        parts = []
        while start < stop:
            epoch, offset = divmod(start, size)
            parts.append(self._order(epoch).part(offset, offset + stop - start))
            start += len(parts[-1])
        return np.concatenate(parts)

    def _order(self, epoch: int) -> Order:
        if epoch not in self._orders:
            if len(self._orders) >= 2:  # a cache, not a state
                self._orders.clear()
            # without self: a cycle would keep the columns of a sampler that is replaced until the collector runs
            keys = partial(epoch_keys, len(self.indices), self.weights, self.seed, self.start, epoch)
            self._orders[epoch] = Order(len(self.indices), keys)
        return self._orders[epoch]


def epoch_keys(size: int, weights: np.ndarray | None, seed: int, start: int, epoch: int) -> Iterator[np.ndarray]:
    """Keys of samples, block by block, whose descending order is one of successive draws by ``weights``.

    Args:
        size: number of samples.
        weights: of the samples, (size,); None is uniform.
        start, epoch: of a :class:`BatchSampler`; every pair has random numbers of its own.
    """
    generator = philox(seed, f"epoch from {start}", epoch)
    for block in blocks(size):
        keys = gumbel(generator, block.stop - block.start)
        if weights is not None:
            with np.errstate(divide="ignore"):
                keys += np.log(weights[block])
        yield keys
