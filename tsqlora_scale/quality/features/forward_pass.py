"""A pass over samples by forwards alone, on any number of ranks, that is taken up where it was killed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora_scale.common.disk_arrays import new_array
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.files import WRITE_ERRORS, written_whole
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality.features.hidden_states import without_adapters
from tsqlora_scale.quality.gradients.evaluation_mode import evaluation_mode
from tsqlora_scale.quality.pool import Pool
from tsqlora_scale.quality.scores.memory_guard import MemoryGuard

#: samples of a batch, where ``scoring.batch_size`` does not say
BATCH = 64
#: From the model and a batch of B samples to numbers of each, (B, width), by one forward.
Look = Callable[[nn.Module, Any], Tensor]


class ForwardPass:
    """Looks at samples through a model in evaluation mode.

    Batches are made of samples of like length, and do not depend on the number of ranks, which take them in turn: so
    every sample's numbers are the same on any number of ranks. Every rank makes as many forwards (ZeRO-3 would hang
    otherwise).

    Args:
        module: the unwrapped model.
        world: the ranks.
        batch_size: samples of a forward; ``auto``: :data:`BATCH`. After an allocation failed it goes on with fewer.
        shard_size: samples after which the numbers are kept.
        max_length: of the texts, in tokens; None: the task's.
        frozen: look through the base alone, without its adapters.
        progress: told (samples done, samples of the pass).
        folder: where numbers are kept while the pass runs, so that a killed one goes on; None: nowhere.
    """

    def __init__(
        self,
        module: nn.Module,
        world: World,
        *,
        batch_size: int | str = "auto",
        shard_size: int = 4096,
        max_length: int | None = None,
        frozen: bool = True,
        progress: Callable[[int, int], None] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.module, self.world = module, world
        self._batch_size = batch_size if isinstance(batch_size, int) else BATCH
        self._shard_size, self._max_length = shard_size, max_length
        self._frozen, self._progress, self._folder = frozen, progress, folder
        self._guard = MemoryGuard(module, world)

    def run(self, pool: Pool[Any], rows: np.ndarray, look: Look, *, name: str) -> np.ndarray:
        """What ``look`` sees of the samples at the pool's ``rows``, (n, width) float32, in their order. A collective.

        Args:
            rows: one or more.
            name: says what ``look`` and the model are, so that a killed pass is taken up by the same alone.

        Raises:
            UserError: a single sample does not fit in memory; on every rank.
        """
        with self.world.together():
            lengths = pool.lengths()
        found: np.ndarray | None = None
        parts = None
        if self.world.is_main and self._folder is not None:  # without a folder no content need be digested
            parts = _Parts(self._folder, self._key(name, pool, rows))
        adapters: AbstractContextManager[None] = without_adapters(self.module) if self._frozen else nullcontext()
        with evaluation_mode(self.module, nullcontext), adapters:
            for number, start in enumerate(range(0, len(rows), self._shard_size)):
                place = slice(start, min(start + self._shard_size, len(rows)))
                kept = self.world.broadcast(None if parts is None else parts.read(number))
                if kept is None:
                    kept = self._shard(pool, rows[place], lengths[rows[place]], look, done=start, total=len(rows))
                    if parts is not None:
                        parts.write(number, kept)
                if found is None:
                    with self.world.together():
                        width = kept.shape[1]
                        found = new_array(len(rows) * width, np.float32).reshape(len(rows), width)
                found[place] = kept
        assert found is not None, "no rows to look at"
        return found

    def _key(self, name: str, pool: Pool[Any], rows: np.ndarray) -> dict[str, Any]:
        """What the numbers of a shard depend on; the batches, too, by their last bits."""
        return {
            "name": name,
            "sizes": [self._shard_size, self._batch_size, self._max_length],
            "pool": pool.digest(),
            "rows": hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest(),
        }

    def forget(self) -> None:
        """Remove what is kept of passes."""
        if self.world.is_main and self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _shard(
        self, pool: Pool[Any], rows: np.ndarray, lengths: np.ndarray, look: Look, *, done: int, total: int
    ) -> np.ndarray:
        order = np.argsort(lengths, kind="stable")
        batches = [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]
        world = self.world
        own: list[tuple[np.ndarray, np.ndarray]] = []
        problem: UserError | None = None

        def work(piece: np.ndarray) -> tuple[Tensor]:
            batch = pool.batch(rows[piece], max_length=self._max_length).to(world.device)
            with torch.no_grad():
                return (look(self.module, batch).float().cpu(),)

        for turn in range(ceil(len(batches) / world.size)):
            chunks = [batches[(turn * world.size + rank) % len(batches)] for rank in range(world.size)]
            chunk = chunks[world.rank]
            try:
                (seen,) = self._guard.run("forward", work, chunk, longest=max(map(len, chunks)))
                if turn * world.size + world.rank < len(batches):  # else a repeated one
                    own.append((chunk, seen.numpy()))
            except UserError as error:
                problem = error  # perhaps of this rank alone: the others must not wait for it
            if self._progress is not None:
                self._progress(min(done + (turn + 1) * world.size * self._batch_size, total), total)
        with world.together():
            if problem is not None:
                raise problem
        gathered = [pair for rank in world.gather_objects(own) for pair in rank]
        values = np.concatenate([seen for _, seen in gathered])
        out = np.empty_like(values)
        out[np.concatenate([chunk for chunk, _ in gathered])] = values
        return out


class _Parts:
    """The shards of a pass on disk, and what they depend on. On rank 0."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self._folder: Path | None = None
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        try:
            (folder / digest).mkdir(parents=True, exist_ok=True)
        except OSError:  # nothing is lost but time, should the pass be killed
            return
        self._folder = folder / digest

    def read(self, number: int) -> np.ndarray | None:
        """A shard, if it is there whole."""
        if self._folder is None:
            return None
        try:
            values: np.ndarray = np.load(self._file(number))
        except (OSError, ValueError):
            return None
        return values

    def write(self, number: int, values: np.ndarray) -> None:
        """Keep a shard, where there is room."""
        if self._folder is None:
            return
        try:
            with written_whole(self._file(number)) as partial, Path(partial).open("wb") as file:
                np.save(file, values)
        except WRITE_ERRORS:
            self._folder = None

    def _file(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"shard-{number:06d}.npy"
