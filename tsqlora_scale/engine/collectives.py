"""The few collectives that the project uses, the same with one process and with many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tsqlora_scale.common.errors import UserError

T = TypeVar("T")


class World:
    """This process among the others. Every method is a collective: all ranks call it, in the same order.

    With one process the methods return their argument unchanged and no process group is needed.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.size = size
        self.device = device or torch.device("cpu")

    @classmethod
    def current(cls, device: torch.device | None = None) -> World:
        """The default process group, or a world of one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(device=device)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    @property
    def size_here(self) -> int:
        """Number of ranks on this machine, as the launcher says. Not a collective."""
        return min(self.size, int(os.environ.get("LOCAL_WORLD_SIZE", self.size)))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over ranks, as a new tensor on the caller's device."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element-wise maximum over ranks."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element-wise mean over ranks of a floating-point tensor."""
        return self.sum(tensor) / self.size

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_on_main(self, value: T) -> list[T] | None:
        """Every rank's value, in rank order, on rank 0; None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value if self.is_main else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def broadcast_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's values on every rank, as a new tensor on the caller's device; same shape and type everywhere."""
        moved = tensor.detach().to(self.device, copy=True)
        if self.size > 1:
            dist.broadcast(moved, src=0)
        return moved.to(tensor.device)

    @contextmanager
    def together(self) -> Iterator[None]:
        """For a stretch of work that can fail on one rank alone, and in which there is no collective.

        Raises:
            UserError: on every rank, that of the first rank that has one. Any other error ends its rank at once.
        """
        problem: str | None = None
        try:
            yield
        except UserError as error:
            problem = str(error)
        found = [one for one in self.gather_objects(problem) if one is not None]
        if found:
            raise UserError(found[0])

    def from_main(self, work: Callable[[], T]) -> T:
        """What rank 0 finds, on every rank: sums may round otherwise with other numbers of threads.

        Raises:
            UserError: on every rank, that of ``work``.
        """
        found: Any = None
        with self.together():
            if self.is_main:
                found = work()
        answer: T = self.broadcast(found)
        return answer

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def _reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        if self.size == 1:
            return tensor.clone()
        moved = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(moved, op=op)
        return moved.to(tensor.device)
