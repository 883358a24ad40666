"""Calls of a module without the batch's dimension, which the model repeats over the batch later on.

DeBERTa-v2 and v3 with ``share_att_key`` send their relative positions, (1, positions, width), through the query and
key layers and repeat the result for every sample. The gradient of such a call's output is a sum over the batch. If the
adapter's part of it gets the batch's dimension at once, every sample has a gradient of its own, at the cost of the
adapter's two products alone; the model's own repetition must then do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MARK = "_tsqlora_early_batch"


def give_batch(output: Tensor, size: int) -> Tensor:
    """(1, ...) to a marked view (size, ...)."""
    early = output.expand(size, *output.shape[1:])
    setattr(early, _MARK, True)
    return early


def same_mark(result: Tensor, source: Tensor) -> Tensor:
    """``result``, marked if ``source`` is: for what is computed from it with per-sample tensors of our own."""
    if getattr(source, _MARK, False):
        setattr(result, _MARK, True)
    return result


class NoSecondBatch(TorchFunctionMode):
    """Inside, a tensor that got its batch by :func:`give_batch`, and what is computed from it, is not repeated again.

    A mark is lost where the tensor meets one of the model's batched tensors: after that nothing repeats it.

    Args:
        size: samples in the batch.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Called instead of every function of torch."""
        kwargs = kwargs or {}
        tensors = list(_tensors([*args, *kwargs.values()]))
        others = [x for x in tensors if not getattr(x, _MARK, False)]
        if len(others) == len(tensors):
            return func(*args, **kwargs)
        if func is Tensor.repeat and _sizes(args) == (self.size, *(1,) * (args[0].dim() - 1)):
            return args[0]
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and not any(x.dim() > 2 and x.shape[0] > 1 for x in others):
            setattr(result, _MARK, True)
        return result


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def _sizes(args: tuple[Any, ...]) -> tuple[int, ...]:
    sizes = args[1:]
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple | torch.Size) else tuple(sizes)
