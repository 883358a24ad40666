"""Ranks whose passes are full of collectives, one of which fails alone: it goes on with the others without computing.

Under ZeRO-3 and FSDP2 every module's forward and backward is preceded by a gather. A rank that leaves a pass in its
middle, out of memory, leaves the others waiting in the next one. So it makes the rest of the pass's gathers and
releases, and computes nothing; after that the ranks can agree what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import nn

from tsqlora_scale.engine.fsdp_internals import Gathers, is_sharded_module
from tsqlora_scale.engine.sharded import has_shards

T = TypeVar("T")
_OF_MODULES = (
    "pre_sub_module_forward_function",
    "post_sub_module_forward_function",
    "pre_sub_module_backward_function",
    "post_sub_module_backward_function",
)


class _Collectives(Protocol):
    """How an engine's gathers are heard, and made without computing."""

    def noted(self, done: list[Any], entered: Callable[[bool], None]) -> AbstractContextManager[None]:
        """Within, every collective is put into ``done`` once it is made; ``entered`` is told before and after it."""
        ...

    def catch_up(self, rest: list[Any]) -> None:
        """Make those that are left, and leave the model as between passes. A collective."""
        ...


class Lockstep:
    """Passes of a model that may be sharded.

    Args:
        module: the unwrapped model.
        mends: whether the ranks can go on after an error.

    Attributes:
        matters: whether the model is sharded. If not, :meth:`run` only calls.
        caught_up: whether the ranks can go on after the error that :meth:`run` has raised. They cannot where it came
            from a collective itself, or under ZeRO-3 where activations are checkpointed.
    """

    def __init__(self, module: nn.Module, *, mends: Callable[[BaseException], bool]) -> None:
        self.matters = has_shards(module)
        self._mends = mends
        self._passes: dict[str, list[Any]] = {}
        self._inside = False
        self._collectives: _Collectives = Gathers(module) if is_sharded_module(module) else _OfZero(module)
        # a checkpointed layer's repetition gathers what the calls of modules alone do not tell of ZeRO-3
        checkpointed = any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
        self._repeats = checkpointed and not is_sharded_module(module)
        self.caught_up = True

    def knows(self, kind: str) -> bool:
        """Whether a pass of this kind need not be seen once, small enough to succeed, before one may fail."""
        return not self.matters or kind in self._passes

    def run(self, kind: str, work: Callable[[], T]) -> T:
        """What ``work`` gives. A collective of the ranks, if sharded.

        Args:
            kind: passes of one kind call the same modules in the same order.
            work: forward and backward passes, of any number of samples.

        Raises:
            Exception: that of ``work``. If the ranks can go on after it, this one has caught up with them.
        """
        if not self.matters:
            return work()
        done: list[Any] = []
        self._inside = False
        with self._collectives.noted(done, self._enter):
            try:
                found = work()
            except Exception as error:
                known = self._passes.get(kind)
                lost = known is None or self._inside or self._repeats
                if known is None or lost or not self._mends(error) or not _begins(known, done):
                    self.caught_up = False
                    raise
                failed = error.with_traceback(None)  # whose frames hold what there is no room for
            else:
                self._passes.setdefault(kind, done)
                return found
        self._collectives.catch_up(known[len(done) :])
        raise failed

    def _enter(self, inside: bool) -> None:
        self._inside = inside  # an error meanwhile is one of a collective itself


@dataclass(frozen=True)
class _Event:
    """A call by which ZeRO-3 gathers or releases."""

    name: str
    call: Callable[..., Any]
    args: tuple[Any, ...]

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, _Event) and self.name == other.name
        return same and all(a is b for a, b in zip(self.args, other.args, strict=True))  # type: ignore[attr-defined]


class _OfZero:
    """The calls by which ZeRO-3's modules gather and release."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @contextmanager
    def noted(self, done: list[Any], entered: Callable[[bool], None]) -> Iterator[None]:
        """See :class:`_Collectives`."""
        from deepspeed.runtime.zero import parameter_offload
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

        depth = len(parameter_offload.FWD_MODULE_STACK)
        noted = [(parameter_offload.DeepSpeedZeRoOffload, name) for name in _OF_MODULES]
        noted.append((PartitionedParameterCoordinator, "reset_step"))
        originals = [(owner, name, getattr(owner, name)) for owner, name in noted]
        for owner, name, original in originals:
            setattr(owner, name, self._noted(name, original, done, entered))
        try:
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)
            del parameter_offload.FWD_MODULE_STACK[depth:]

    @staticmethod
    def _noted(
        name: str, original: Callable[..., Any], done: list[Any], entered: Callable[[bool], None]
    ) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            entered(True)
            result = original(*args)
            entered(False)
            done.append(_Event(name, original, args))
            return result

        return call

    def catch_up(self, rest: list[Any]) -> None:
        """See :class:`_Collectives`."""
        from deepspeed.runtime.zero import parameter_offload

        depth = len(parameter_offload.FWD_MODULE_STACK)
        for event in rest:
            event.call(*event.args)
        del parameter_offload.FWD_MODULE_STACK[depth:]
        for part in self._module.modules():  # counts of calls whose backward will not come
            for name in ("applied_pre_backward_ref_cnt", "ds_grads_remaining"):
                if name in part.__dict__:
                    setattr(part, name, 0)


def _begins(known: list[Any], done: list[Any]) -> bool:
    return len(done) <= len(known) and all(a is b or a == b for a, b in zip(known, done, strict=False))
