"""Tensors that lie in the file they were read from."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def leave_file(module: nn.Module, params: Iterable[nn.Parameter]) -> None:
    """Give parameters, and all buffers of ``module``, memory of their own, where they are.

    On a CPU a loaded tensor is a part of the file, and as long as there is one all that has been read of the file stays
    resident: weights too that have been packed or sharded since. Integers stay: packed weights are new.
    """
    for param in params:
        if _in_memory(param):
            param.data = param.data.clone()
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and _in_memory(buffer):  # may be a view, which keeps what it is one of
                part._buffers[name] = buffer.detach().clone()


def _in_memory(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_floating_point()
