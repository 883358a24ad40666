"""Between host and device without waiting for the device."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on ``device``.

    The copy joins the device's queue. From ordinary memory CUDA takes what it copies before it returns, so the tensor
    may be changed or freed at once.
    """
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """Small tensors on their way to the host, which waits only where it reads them.

    Args:
        tensors: of one device, of one dimension or none.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._copies = [tensor.detach().to("cpu", non_blocking=True) for tensor in tensors]  # into pinned memory
        self._arrived: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[list[float]]:
        """Every tensor's numbers."""
        return [copy.reshape(-1).tolist() for copy in self.tensors()]

    def tensors(self) -> list[torch.Tensor]:
        """The tensors on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copies
