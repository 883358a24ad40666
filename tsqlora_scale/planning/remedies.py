"""Where nothing fits: which keys of the config would make it fit, each tried by a plan of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.config.schema import Config
from tsqlora_scale.planning.engine_memory import EngineMemory

#: Tokens below which a text is no longer cut for memory's sake.
SHORTEST = 32
#: How many times as many devices are thought of.
TIMES = (2, 4, 8)


class Plans(Protocol):
    """Plans of changed configs, on so many devices."""

    def least(self, config: Config, devices: int) -> EngineMemory:
        """What needs least: the smallest micro-batch, with checkpointing, under the engine that then needs least."""
        ...

    def proposal(self, config: Config, devices: int) -> EngineMemory | None:
        """What fits and costs least."""
        ...


@dataclass(frozen=True)
class Remedy:
    """Changes of a config.

    Attributes:
        changes: keys with their new values; ``devices`` is no key, but what the plan was asked for.
        memory: what then fits, engine, micro-batch and checkpointing chosen anew; or needs least.
        fits: whether it does.
    """

    changes: dict[str, Any]
    memory: EngineMemory
    fits: bool

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values, sizes in bytes."""
        return {
            "changes": self.changes,
            "fits": self.fits,
            "memory": asdict(self.memory) | {"total": self.memory.total},
        }


def find_remedies(config: Config, *, devices: int, memory: int, least: EngineMemory, plans: Plans) -> list[Remedy]:
    """For every kind of change the mildest that makes it fit; where no kind does alone, one remedy of all together,
    which may not fit either.

    Args:
        devices: that nothing fits on.
        memory: bytes of one of them.
        least: what needs least as the config is.
    """
    above = {phase for phase, size in least.phases.items() if size + least.allowance > memory}
    trial = _Trial(config, devices, memory, plans)
    found: list[Remedy] = []
    harshest: dict[str, Any] = {}
    for helped, kind in _kinds(config, devices):
        if kind and above & helped:
            if above <= helped and (remedy := _mildest(kind, trial)) is not None:
                found.append(remedy)
            harshest |= kind[-1]
    if found or not harshest:
        return [trial.at_its_best(remedy) for remedy in found]
    harshest.pop("devices", None)
    together = [harshest, *({**harshest, "devices": count} for count in _more(config, devices)[-1:])]
    last: Remedy | None = None
    for changes in together:
        last = trial(changes) or last
        if last is not None and last.fits:
            break
    return [] if last is None else [trial.at_its_best(last) if last.fits else last]


class _Trial:
    """A plan under changes of a config; None where the config does not take them."""

    def __init__(self, config: Config, devices: int, memory: int, plans: Plans) -> None:
        self._config, self._devices, self._memory, self._plans = config, devices, memory, plans

    def __call__(self, changes: dict[str, Any]) -> Remedy | None:
        """What needs least under them."""
        changed = self._changed(changes)
        if changed is None:
            return None
        try:
            need = self._plans.least(changed, changes.get("devices", self._devices))
        except UserError:
            return None
        return Remedy(changes, need, need.total <= self._memory)

    def at_its_best(self, remedy: Remedy) -> Remedy:
        """The same changes with the engine, micro-batch and checkpointing that then fit and cost least."""
        changed = self._changed(remedy.changes)
        assert changed is not None, "they have been tried"
        best = self._plans.proposal(changed, remedy.changes.get("devices", self._devices))
        return remedy if best is None else replace(remedy, memory=best)

    def _changed(self, changes: dict[str, Any]) -> Config | None:
        tree = self._config.model_dump(mode="json")
        for key, value in changes.items():
            if key != "devices":
                section, name = key.split(".")
                tree[section][name] = value
        try:
            return parse_config(tree)
        except UserError:
            return None


def _mildest(kind: list[dict[str, Any]], trial: _Trial) -> Remedy | None:
    """The first change that fits of some, each of which needs less than the one before; None if the last does not."""
    best = trial(kind[-1])
    if best is None or not best.fits:
        return None
    low, high = 0, len(kind) - 1  # kind[high] fits
    while low < high:
        middle = (low + high) // 2
        remedy = trial(kind[middle])
        if remedy is not None and remedy.fits:
            best, high = remedy, middle
        else:
            low = middle + 1
    return best


def _kinds(config: Config, devices: int) -> Iterator[tuple[set[str], list[dict[str, Any]]]]:
    """Changes by kind with the phases that they help: what changes no result, then what rounds, then what is learned
    from less. Of a kind the mildest is first."""
    batch, everything = config.scoring.batch_size, {"step", "scoring", "evaluation"}
    yield {"scoring"}, [{"scoring.batch_size": size} for size in (8, 4, 2, 1) if batch != "auto" and size < batch]
    yield {"evaluation"}, [{"train.eval_batch_size": size} for size in _halves(config.train.eval_batch_size, 1)]
    yield everything, [{"devices": count} for count in _more(config, devices)]
    half = {"model.dtype": "bf16"} if config.model.dtype == "fp32" else {}
    yield everything, [half] if half else []
    yield everything, [{"model.quantization": "nf4", **half}] if config.model.quantization == "none" else []
    scored = _halves(config.scoring.max_length or config.task.max_length, SHORTEST)
    yield {"scoring"}, [{"scoring.max_length": length} for length in scored]
    yield everything, [_shorter(config, length) for length in _halves(config.task.max_length, SHORTEST)]


def _more(config: Config, devices: int) -> list[int]:
    return [devices * times for times in TIMES if config.train.batch_size % (devices * times) == 0]


def _shorter(config: Config, length: int) -> dict[str, Any]:
    target = config.task.max_target_length
    cut = config.task.type in ("causal", "seq2seq") and target > length
    return {"task.max_length": length, **({"task.max_target_length": length // 2} if cut else {})}


def _halves(size: int, least: int) -> list[int]:
    found = []
    while size // 2 >= least:
        size //= 2
        found.append(size)
    return found
