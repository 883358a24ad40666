"""How many samples a scoring batch can hold: measured on a few, not guessed."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

#: Share of the free memory that a batch may take: its gradients and the second forward come on top of what is measured.
SHARE_OF_FREE = 0.5
#: Larger batches were no faster.
LARGEST = {"cpu": 32}
LARGEST_ON_ACCELERATOR = 128
#: parameters of glibc's mallopt
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def reuse_freed_memory() -> None:
    """Let this process keep memory that it freed, instead of giving it back and asking for it again.

    A backward pass that makes no parameter gradients frees everything that it took. By default glibc then hands the
    pages back, and the next batch faults every one of them in: 10 to 50 % of a pass on a CPU (MiniLM, 32 x 128). The
    process stays as large as its largest batch made it. With another C library it does nothing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(M_MMAP_THRESHOLD, 2**30):  # older releases take no more than 32 MB
            mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def bytes_kept(module: nn.Module, call: Callable[[], Any]) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward pass of ``call``, without parameters.

    Counted where they are saved, so it needs no device's statistics and is the same in every run.
    """
    parameters = {p.data_ptr() for p in module.parameters() if p.numel()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of what is computed inside and still there.

    Args:
        parameters: whose storages are not counted.

    Attributes:
        peak: the most at any time.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._others = {p.untyped_storage().data_ptr() for p in parameters if p.numel()}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called instead of every operation."""
        result = func(*args, **(kwargs or {}))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._others:
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def free_bytes(device: torch.device, ranks_here: int) -> int:
    """Memory that one of ``ranks_here`` processes on this machine may still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    import psutil

    return int(psutil.virtual_memory().available / ranks_here)


def fitting_batch(bytes_per_sample: float, free: int, device: torch.device) -> int:
    """The largest power of two of samples that fits, at least 1."""
    most = LARGEST.get(device.type, LARGEST_ON_ACCELERATOR)
    fits = SHARE_OF_FREE * free / max(bytes_per_sample, 1.0)
    size = 1
    while size * 2 <= min(fits, most):
        size *= 2
    return size


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or on the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
