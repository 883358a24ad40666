"""Bytes that are there and operations that are done, followed through a pass of tensors without memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class LiveStorages(TorchDispatchMode):
    """Inside, every storage that an operation makes is counted from then on until it is freed.

    A model may ask for values, which tensors without memory have none of. It is told that nothing holds for all
    elements (so that masks are made, as of rows that are padded), that numbers are 1, and that of a matrix of booleans
    so many are true as a batch has targets.

    Args:
        others: tensors whose storages are not counted: parameters and their gradients.
        targets: true elements of a matrix of booleans; None: all.

    Attributes:
        now: bytes that are there.
        peak: the most at any time.
        flops: multiplications and additions of matrix products and attention.
    """

    def __init__(self, others: Iterable[Tensor], *, targets: int | None = None) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._targets = targets
        self._others = {tensor.untyped_storage()._cdata for tensor in others}
        self._live: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called instead of every operation."""
        if func in _ANSWERS:
            result = _ANSWERS[func](args[0], self._targets)
        else:
            result = func(*args, **(kwargs or {}))
            self.flops += _flops(func, args, kwargs or {}, result)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._notice(tensor)
        return result

    def _notice(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._others:
            return
        size = storage.nbytes()
        self._live[key] = weakref.ref(storage, partial(self._gone, key)), size
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, _: object) -> None:
        self.now -= self._live.pop(key)[1]


class FusedAttention(TorchFunctionMode):
    """Inside, attention drops nothing out: a CPU's fused kernel then takes it, which keeps for the backward pass what
    GPUs' kernels keep with dropout, too."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called instead of every function of torch."""
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def _places(mask: Tensor, targets: int | None) -> Tensor:
    known = targets is not None and mask.dtype == torch.bool and mask.dim() == 2
    count = min(mask.numel(), targets) if known and targets is not None else mask.numel()
    return mask.new_empty((count, mask.dim()), dtype=torch.int64)


def _number(tensor: Tensor, _: int | None) -> bool | float | int:
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 1


_ANSWERS: dict[Any, Callable[[Tensor, int | None], Any]] = {
    aten._local_scalar_dense.default: _number,
    aten.equal.default: lambda tensor, _: False,
    aten.nonzero.default: _places,
    # BART's classifiers see so that all rows have as many ends
    aten.unique_consecutive.default: lambda tensor, _: (tensor.new_empty(1), tensor.new_empty(0), tensor.new_empty(0)),
}


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    packet = getattr(func, "_overloadpacket", None)
    name = getattr(packet, "__name__", "")
    if name.startswith(_ATTENTION):  # of which torch counts a GPU's alone
        query, key = args[1 if name.endswith("backward") else 0], args[2 if name.endswith("backward") else 1]
        products = 5 if name.endswith("backward") else 2
        return int(products * 2 * query.numel() * key.shape[-2])
    count = flop_registry.get(packet)
    return int(count(*args, **kwargs, out_val=result)) if count is not None else 0
