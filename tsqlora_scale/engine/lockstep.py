"""Ranks whose passes are full of collectives, one of which fails alone: it goes on with the others without computing.

Under ZeRO-3 every module's forward and backward is preceded by a gather. A rank that leaves a pass in its middle, out
of memory, leaves the others waiting in the next one. So it makes the rest of the pass's gathers and releases, and
computes nothing; after that the ranks can agree what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from tsqlora_scale.engine.sharded import has_shards

T = TypeVar("T")
_OF_MODULES = (
    "pre_sub_module_forward_function",
    "post_sub_module_forward_function",
    "pre_sub_module_backward_function",
    "post_sub_module_backward_function",
)


@dataclass(frozen=True)
class _Event:
    """A call by which ZeRO-3 gathers or releases."""

    name: str
    call: Callable[..., Any]
    args: tuple[Any, ...]

    def is_like(self, other: _Event) -> bool:
        return self.name == other.name and all(a is b for a, b in zip(self.args, other.args, strict=True))


class Lockstep:
    """Passes of a model that may be sharded.

    Args:
        module: the unwrapped model.
        mends: whether the ranks can go on after an error.

    Attributes:
        matters: whether the model is sharded. If not, :meth:`run` only calls.
        caught_up: whether the ranks can go on after the error that :meth:`run` has raised. They cannot where it came
            from a collective itself, or where activations are checkpointed: a layer's repetition gathers what the
            calls of modules alone do not tell.
    """

    def __init__(self, module: nn.Module, *, mends: Callable[[BaseException], bool]) -> None:
        self.matters = has_shards(module)
        self._module = module
        self._mends = mends
        self._passes: dict[str, list[_Event]] = {}
        self._inside = False
        self._repeats = any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
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
        done: list[_Event] = []
        with self._noting(done):
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
        self._catch_up(known[len(done) :])
        raise failed

    @contextmanager
    def _noting(self, done: list[_Event]) -> Iterator[None]:
        from deepspeed.runtime.zero import parameter_offload
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

        self._inside = False
        depth = len(parameter_offload.FWD_MODULE_STACK)
        noted = [(parameter_offload.DeepSpeedZeRoOffload, name) for name in _OF_MODULES]
        noted.append((PartitionedParameterCoordinator, "reset_step"))
        originals = [(owner, name, getattr(owner, name)) for owner, name in noted]
        for owner, name, original in originals:
            setattr(owner, name, self._noted(name, original, done))
        try:
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)
            del parameter_offload.FWD_MODULE_STACK[depth:]

    def _noted(self, name: str, original: Callable[..., Any], done: list[_Event]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self._inside = True  # an error from here on is one of a collective itself
            result = original(*args)
            self._inside = False
            done.append(_Event(name, original, args))
            return result

        return call

    def _catch_up(self, rest: list[_Event]) -> None:
        from deepspeed.runtime.zero import parameter_offload

        depth = len(parameter_offload.FWD_MODULE_STACK)
        for event in rest:
            event.call(*event.args)
        del parameter_offload.FWD_MODULE_STACK[depth:]
        for part in self._module.modules():  # counts of calls whose backward will not come
            for name in ("applied_pre_backward_ref_cnt", "ds_grads_remaining"):
                if name in part.__dict__:
                    setattr(part, name, 0)


def _begins(known: list[_Event], done: list[_Event]) -> bool:
    return len(done) <= len(known) and all(a.is_like(b) for a, b in zip(known, done, strict=False))
