"""Trackers that hear a small model, on one rank and on two."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tests.unit.ranks.models import Batch
from tests.worlds import run_on_ranks
from tsqlora_scale.config.schema import SensitivityConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.ranks.sensitivity import SensitivityTracker

SIZE = 8


def make_tracker(estimator: str = "weight", *, micro: int = SIZE, every: int = 1, beta: float = 0.0,
                 group: int | str | None = None, samples: int | None = None, uncertainty: float | None = None,
                 sketch_seed: int | None = None, halves: bool = False) -> SensitivityTracker:  # fmt: skip
    """Groups of four samples, or fewer where the micro-batch is smaller."""
    size = math.gcd(micro, 4) if group is None else group
    cfg = SensitivityConfig(
        estimator=estimator, every=every, beta=beta, group_size=size, max_samples=samples, uncertainty=uncertainty
    )
    events = range(1, 1000, every)  # so that steps 0, every, 2 every, ... are heard
    return SensitivityTracker(
        cfg, batch_size=SIZE, micro_batch_size=micro, events=events, sketch_seed=sketch_seed, halves=halves
    )


def train_step(tracker: SensitivityTracker, model: nn.Module, batches: list[Batch], step: int = 0, scale: float = 1.0):
    tracker.start_step(step, loss_scale=scale)
    position = 0
    for batch in batches:
        tracker.start_micro_batch(len(batch), position)
        position += len(batch)
        (scale * batch.loss(model)).backward()
    tracker.end_step(taken=True)


def measure(
    model: nn.Module, batches: list[Batch], estimator: str = "weight", *, step: int = 0, **kwargs
) -> dict[str, float]:
    tracker = make_tracker(estimator, micro=len(batches[0]), **kwargs)
    tracker.attach(model)
    train_step(tracker, model, batches, step)
    tracker.detach()
    return tracker.reduce(World())


def split(batch: Batch, parts: int) -> list[Batch]:
    size = len(batch) // parts
    return [batch[i * size : (i + 1) * size] for i in range(parts)]


class CountingWorld(World):
    """Counts its all-reduces."""

    means = 0

    def mean(self, tensor: Tensor) -> Tensor:
        self.means += 1
        return super().mean(tensor)


@dataclass
class Heard:
    """What one rank has at an event: layer -> sensitivity, and layer -> sketch where these are taken."""

    sensitivity: dict[str, float]
    sketches: dict[str, Tensor]


def on_two_ranks(
    model: nn.Module, batches: list[Batch], estimator: str, *, group: int = 2, **kwargs: Any
) -> list[Heard]:
    """Two real ranks of two micro-batches each; the loss is scaled by ranks x accumulation, as engines do."""
    heard = run_on_ranks(_hear, 2, model, batches, estimator, {"group": group, **kwargs})
    assert heard[0].sensitivity == heard[1].sensitivity
    return heard


def _hear(world: World, model: nn.Module, batches: list[Batch], estimator: str, options: dict[str, Any]) -> Heard:
    tracker = make_tracker(estimator, micro=2, **options)
    tracker.attach(model)
    for step, batch in enumerate(batches):
        tracker.start_step(step, loss_scale=4.0)
        for number, part in enumerate(split(batch, 4)[world.rank :: 2]):
            tracker.start_micro_batch(2, 2 * (2 * number + world.rank))
            (4.0 * part.loss(model)).backward()
        tracker.end_step(taken=True)
    tracker.detach()
    counting = CountingWorld(world.rank, world.size, world.device)
    sensitivity = tracker.reduce(counting)
    sketches = tracker.sketches()
    assert counting.means == 1 + len(sketches), "one all-reduce for all layers, and one of each sketch"
    return Heard(sensitivity, sketches)
