"""Whether the ranks hold the same: asked wherever a run is saved, resumed or changed, for what differs trains on.

A factor that was made after the engine started, or a checkpoint of which one rank has restored its part only, raises
no error anywhere: the ranks train apart, and what is saved is one rank's idea of it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import torch

from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.train_state import TrainState

#: Names of parameters that a message gives.
SHOWN = 3


class ReplicasDiffer(RuntimeError):
    """Ranks hold other factors or moments than the rest; raised on all of them, before anything is written."""


@dataclass
class Holdings:
    """What one rank says of itself.

    Attributes:
        digests: of every value, first and second moment, by ``value of NAME`` and so on; and of the step count.
        faults: what this rank knows to be wrong by itself.
    """

    digests: dict[str, str]
    faults: list[str] = field(default_factory=list)

    @classmethod
    def from_state(cls, state: TrainState, faults: list[str]) -> Holdings:
        """Of a state that every rank has whole."""
        parts = ("value", "exp_avg", "exp_avg_sq")
        found = {
            f"{part} of {name}": _digest(getattr(entry, part))
            for name, entry in state.params.items()
            for part in (parts if state.optimizer_steps else parts[:1])
        }
        return cls({**found, "optimizer_steps": str(state.optimizer_steps)}, faults)


def compare(world: World, held: Holdings, *, when: str) -> None:
    """Compare what the ranks hold, by one small exchange. A collective.

    Args:
        held: by this rank.
        when: for the message.

    Raises:
        ReplicasDiffer: on every rank, naming the ranks that are not as most are (of two, not as rank 0 is), and what
            they hold otherwise.
    """
    everyone = world.gather_objects(held)
    problems = [f"rank {rank}: {_listed(one.faults)}" for rank, one in enumerate(everyone) if one.faults]
    kinds = Counter(tuple(sorted(one.digests.items())) for one in everyone)
    usual = dict(kinds.most_common(1)[0][0])  # of equally many, those of the first rank that is among them
    for rank, one in enumerate(everyone):
        differing = [key for key in usual.keys() | one.digests.keys() if usual.get(key) != one.digests.get(key)]
        if differing:
            problems.append(f"rank {rank} of {world.size} differs in {_listed(sorted(differing, key=_order))}")
    if problems:
        raise ReplicasDiffer(
            f"{when}, the ranks do not hold the same factors and moments ({'; '.join(problems)}); nothing of it "
            "was written; resume from the last checkpoint"
        )


def _digest(tensor: torch.Tensor) -> str:
    bits = tensor.detach().cpu().reshape(-1).numpy().tobytes()
    return hashlib.blake2b(bits, digest_size=8).hexdigest() + str(tuple(tensor.shape))


def _order(key: str) -> tuple[bool, str]:
    """Values before moments, which follow from them."""
    return not key.startswith("value"), key


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more
