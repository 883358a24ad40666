"""Safetensors files written a tensor at a time, of models that are larger than memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

#: Bytes of a file, above which the next one begins; a tensor is never divided.
SHARD_BYTES = 5 * 10**9

#: As the format writes them.
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
TORCH_TYPES = {name: dtype for dtype, name in _TYPES.items()}


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is made when it is written.

    Attributes:
        make: gives it, of ``shape`` and ``dtype``, on the CPU.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_shards(tensors: Iterable[StreamedTensor], folder: Path, *, shard_bytes: int | None = None) -> list[str]:
    """Write ``model.safetensors``, or numbered files and their index, holding one tensor in memory at a time.

    Args:
        shard_bytes: of a file at most, :data:`SHARD_BYTES` unless given.

    Returns:
        The files' names.

    Raises:
        OSError: they cannot be written.
    """
    shards = list(_shards(tensors, SHARD_BYTES if shard_bytes is None else shard_bytes))
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if len(names) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        _write(shard, folder / name)
    if len(names) > 1:
        placed = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return names


def _shards(tensors: Iterable[StreamedTensor], most: int) -> Iterator[list[StreamedTensor]]:
    """The tensors in order, as many in a file as it may hold."""
    shard: list[StreamedTensor] = []
    for tensor in tensors:
        if shard and sum(each.nbytes for each in shard) + tensor.nbytes > most:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _write(tensors: Sequence[StreamedTensor], path: Path) -> None:
    """The format: the header's length in 8 bytes, the header as JSON, the tensors' bytes without gaps."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # so that each begins where its type may
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            value = tensor.make().contiguous()
            assert (tuple(value.shape), value.dtype) == (tensor.shape, tensor.dtype), (tensor, value.shape, value.dtype)
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
