"""Trackers that hear a small model, on one rank and on two."""

import copy
import math

from torch import Tensor, nn

from tests.unit.ranks.models import Batch
from tsqlora_scale.config.schema import SensitivityConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.ranks.sensitivity import SensitivityTracker

SIZE = 8


def make_tracker(estimator: str = "weight", *, micro: int = SIZE, every: int = 1, beta: float = 0.0,
                 group: int | str | None = None, samples: int | None = None, uncertainty: float | None = None,
                 sketch_seed: int | None = None) -> SensitivityTracker:  # fmt: skip
    """Groups of four samples, or fewer where the micro-batch is smaller."""
    size = math.gcd(micro, 4) if group is None else group
    cfg = SensitivityConfig(
        estimator=estimator, every=every, beta=beta, group_size=size, max_samples=samples, uncertainty=uncertainty
    )
    events = range(1, 1000, every)  # so that steps 0, every, 2 every, ... are heard
    return SensitivityTracker(cfg, batch_size=SIZE, micro_batch_size=micro, events=events, sketch_seed=sketch_seed)


def train_step(tracker: SensitivityTracker, model: nn.Module, batches: list[Batch], step: int = 0, scale: float = 1.0):
    tracker.start_step(step, loss_scale=scale)
    position = 0
    for batch in batches:
        tracker.start_micro_batch(len(batch), position)
        position += len(batch)
        (scale * batch.loss(model)).backward()
    tracker.end_step(taken=True)


def measure(model: nn.Module, batches: list[Batch], estimator: str = "weight", **kwargs) -> dict[str, float]:
    tracker = make_tracker(estimator, micro=len(batches[0]), **kwargs)
    tracker.attach(model)
    train_step(tracker, model, batches)
    tracker.detach()
    return tracker.reduce(World())


def split(batch: Batch, parts: int) -> list[Batch]:
    size = len(batch) // parts
    return [batch[i * size : (i + 1) * size] for i in range(parts)]


class Recorder(World):
    """A rank that shows what it would send, and receives the mean that it is told."""

    def __init__(self, answer: Tensor | None = None) -> None:
        super().__init__()
        self.sent: list[Tensor] = []
        self._answer = answer

    def mean(self, tensor: Tensor) -> Tensor:
        self.sent.append(tensor)
        return tensor if self._answer is None else self._answer


def on_two_ranks(
    model: nn.Module, batches: list[Batch], estimator: str, *, group: int = 2, **kwargs
) -> list[SensitivityTracker]:
    """Two ranks of two micro-batches each; the loss is scaled by ranks x accumulation, as engines do."""
    sent, trackers = [], []
    for rank in range(2):
        tracker = make_tracker(estimator, micro=2, group=group, **kwargs)
        tracker.attach(model)
        for step, batch in enumerate(batches):
            tracker.start_step(step, loss_scale=4.0)
            for number, part in enumerate(split(batch, 4)[rank::2]):
                tracker.start_micro_batch(2, 2 * (2 * number + rank))
                (4.0 * part.loss(model)).backward()
            tracker.end_step(taken=True)
        tracker.detach()
        world = Recorder()
        copy.deepcopy(tracker).synchronize(world)
        assert len(world.sent) == 1, "one all-reduce for all layers"
        sent.append(world.sent[0])
        trackers.append(tracker)
    results = [tracker.reduce(Recorder((sent[0] + sent[1]) / 2)) for tracker in trackers]
    assert results[0] == results[1]
    return trackers
