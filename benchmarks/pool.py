#!/usr/bin/env python3
"""The scores of large pools on one rank: seconds of every step, and the memory that the process itself takes.

    python benchmarks/pool.py --out DIR --sizes 1e6,1e7,1e8

Everything that a run does with scores, but for the model: losses, norms, loss reductions and small sketches are random
numbers. A pass in parts on disk, the table and S, uniform draws of the warm-up, draws by the scores, the score file, a
checkpoint and its resumption, and a refresh of a tenth of S. Two numbers say what the memory is: the largest growth of
resident memory that belongs to no file, looked at a hundred times a second, and the room that the folder took at most.
Every size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.sampler import anonymous_bytes  # noqa: E402
from benchmarks.watch import Watch  # noqa: E402
from tsqlora_scale.common.disk_arrays import counted, filled  # noqa: E402
from tsqlora_scale.common.random_streams import philox  # noqa: E402
from tsqlora_scale.config.schema import SamplingConfig, ScoringConfig  # noqa: E402
from tsqlora_scale.engine.collectives import World  # noqa: E402
from tsqlora_scale.engine.train_state import TrainState  # noqa: E402
from tsqlora_scale.quality import BatchSampler, QualityScorer  # noqa: E402
from tsqlora_scale.quality.scores.measurer import Measurer  # noqa: E402
from tsqlora_scale.quality.scores.score_parts import Kind, PassPart  # noqa: E402
from tsqlora_scale.run.checkpoint import read_checkpoint, write_checkpoint  # noqa: E402

STEPS = ("pass", "uniform draws", "set-up of draws", "score file", "checkpoint", "resumption", "refresh")


class RowNumbers(Sequence[str]):
    """``"0"``, ``"1"``, ..., made when they are asked for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: Any) -> Any:
        return [str(i) for i in range(*key.indices(self.size))] if isinstance(key, slice) else str(key)


class RandomMeasurer(Measurer[Any]):
    """Measures no model: random numbers that belong to the sample and the pass."""

    passes = 0

    @contextmanager
    def on(self, module: nn.Module) -> Iterator[None]:
        """Nothing to prepare."""
        yield
        self.passes += 1

    def measure(
        self, indices: np.ndarray, *, kind: Kind, progress: Callable[[int], None] | None = None
    ) -> PassPart | None:
        """Numbers of a shard."""
        generator = philox(self.passes, "benchmark", int(indices[0]))
        values = np.exp(0.5 * generator.standard_normal((len(indices), 3)))
        width = self.scoring.sketch_dim
        sketches = generator.random((len(indices), width), dtype=np.float32) - np.float32(0.3)
        return PassPart(indices, values, sketches, 1e-7, self.prepare(indices, kind))

    def prepare(self, indices: np.ndarray, kind: Kind) -> int:
        """There are no batches."""
        assert self.batch_size is not None
        self.one_at_a_time = False
        return self.batch_size


class Peaks(Watch):
    """The largest anonymous memory of this process and the least free room of a disk, while it is open."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.memory, self.free = anonymous_bytes(), shutil.disk_usage(folder).free

    def look(self) -> None:
        """At both."""
        self.memory = max(self.memory, anonymous_bytes())
        self.free = min(self.free, shutil.disk_usage(self.folder).free)


class NumberedPool:
    """Samples of which nothing but their numbers and their strata is known."""

    def __init__(self, size: int, strata: np.ndarray | None) -> None:
        self.sample_ids = RowNumbers(size)
        self._strata = strata

    def __len__(self) -> int:
        return len(self.sample_ids)

    def digest(self) -> str:
        """None: there is no content."""
        return ""

    query = None
    query_rows = 0

    def class_ids(self) -> None:
        """None: there are no classes."""

    def lengths(self) -> np.ndarray:
        """All alike."""
        return np.broadcast_to(np.int32(1), len(self))

    def draw_weights(self) -> np.ndarray | None:
        """All alike."""
        return None

    def strata(self) -> np.ndarray | None:
        """As given."""
        return self._strata

    def texts(self, rows: np.ndarray) -> list[tuple[str, ...]]:
        """Never asked for: no text is looked at."""
        raise NotImplementedError

    def batch(self, rows: np.ndarray, *, max_length: int | None = None) -> Any:
        """Never asked for: no model is measured."""
        raise NotImplementedError

    def losses(self, module: Any, batch: Any) -> torch.Tensor:
        """Never asked for: no model is measured."""
        raise NotImplementedError


def no_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Of a model that is not there."""
    return {}


def scorer_of(size: int, folder: Path, sketch_dim: int, shard: int, strata: np.ndarray | None) -> QualityScorer:
    """A scorer of a pool without a model."""
    scoring = ScoringConfig(sketch_dim=sketch_dim, shard_size=shard, batch_size=32, refresh_fraction=0.1)
    pool, world, eta = NumberedPool(size, strata), World(), 0.1
    scorer: QualityScorer = QualityScorer(
        scoring,
        SamplingConfig(keep_fraction=0.5),
        pool=pool,
        theta=no_layers,
        world=world,
        seed=0,
        eta=eta,
        stratify=True,
        parts_folder=folder / "parts",
    )
    measurer = RandomMeasurer(scoring, pool=pool, theta=no_layers, seed=0, eta=eta, world=world)
    scorer._measurer = scorer._kind._measurer = measurer
    return scorer


def draws_per_second(sampler: BatchSampler, batches: int) -> float:
    """Samples drawn in a second."""
    start = time.perf_counter()
    for step in range(batches):
        sampler.draw(step)
    return batches * sampler.batch_size / (time.perf_counter() - start)


def measure(folder: Path, size: int, *, sketch_dim: int, shard: int, batch: int) -> dict[str, float]:
    """Seconds of the steps, draws a second, and the peaks."""
    tempfile.tempdir = str(folder)
    found: dict[str, float] = {}

    def timed(name: str, step: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = step()
        found[name] = time.perf_counter() - start
        return result

    before, free = anonymous_bytes(), shutil.disk_usage(folder).free
    with Peaks(folder) as peaks:
        strata = filled(size, np.int32, 0)
        strata[:: size // 3] = 1
        scorer, seen = scorer_of(size, folder, sketch_dim, shard, strata), filled(size, np.uint8, 0)
        model = nn.Identity()
        uniform = BatchSampler(counted(size), None, batch_size=batch, seed=0, replacement=False)
        timed("uniform draws", lambda: uniform.draw(0))
        table = timed("pass", lambda: scorer.score(model))
        sampler = timed(
            "set-up of draws",
            lambda: BatchSampler(*scorer.draws(), batch_size=batch, seed=0, replacement=True),
        )
        found["draws/s"] = draws_per_second(sampler, 20)
        timed("score file", lambda: table.write(folder / "scores", scorer.pool.sample_ids))
        shutil.rmtree(folder / "scores")

        def save() -> None:
            tree = {"sampler": sampler.state_dict(), "scorer": scorer.state_dict(), "seen": torch.from_numpy(seen)}
            write_checkpoint(folder / "step-00000001", TrainState(), tree)

        timed("checkpoint", save)

        def resume() -> None:
            tree = read_checkpoint(folder / "step-00000001")[1]
            resumed = scorer_of(size, folder, sketch_dim, shard, strata)
            resumed.load_state_dict(tree["scorer"])
            again = BatchSampler(*resumed.draws(), batch_size=batch, seed=0, replacement=True)
            again.load_state_dict(tree["sampler"])

        timed("resumption", resume)
        shutil.rmtree(folder / "step-00000001")
        timed("refresh", lambda: (scorer.score(model, refresh=True), scorer.draws()))
    scorer.discard_parts()
    return found | {"memory MB": (peaks.memory - before) / 1e6, "disk GB": (free - peaks.free) / 1e9}


def main() -> None:
    """Measure every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder on a disk with 300 bytes of room per sample")
    parser.add_argument("--sizes", default="1e6,1e7,1e8")
    parser.add_argument("--sketch-dim", type=int, default=16)
    parser.add_argument("--shard", type=int, default=2**16, help="samples of a part")
    parser.add_argument("--batch", type=int, default=65_536, help="draws at once")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sizes = {name: getattr(options, name) for name in ("sketch_dim", "shard", "batch")}
        print(json.dumps(measure(options.out, int(options.one), **sizes)))
        return
    names = [*STEPS, "draws/s", "memory MB", "disk GB"]
    print(f"| pool | {' | '.join(names)} |")
    print("|" + "---|" * (len(names) + 1))
    for size in [float(text) for text in options.sizes.split(",")]:
        folder = options.out / f"pool-{size:.0e}"
        folder.mkdir(parents=True)
        command = [sys.executable, __file__, "--out", str(folder), "--one", str(size), "--batch", str(options.batch)]
        command += ["--shard", str(options.shard), "--sketch-dim", str(options.sketch_dim)]
        try:
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        finally:
            shutil.rmtree(folder)
        print(f"| {size:.0e} | {' | '.join(f'{json.loads(done.stdout)[name]:.3g}' for name in names)} |", flush=True)


if __name__ == "__main__":
    main()
