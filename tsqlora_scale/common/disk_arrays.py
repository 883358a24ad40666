"""Columns of a pool, one entry a sample, that may be larger than memory.

Small ones are ordinary arrays. Large ones are mapped to a temporary file: the system keeps in memory what there is room
for, so that a process's own memory does not grow with the pool. What makes temporaries as long as a column goes through
it block by block; reductions and operations with ``out=`` make none and need no blocks.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
from numpy.typing import DTypeLike

from tsqlora_scale.common.errors import UserError

#: Bytes of the largest column that is held in memory.
IN_MEMORY = 2**24
#: samples that are looked at together
BLOCK = 2**20


def blocks(size: int, length: int | None = None) -> Iterator[slice]:
    """The slices of ``length`` (:data:`BLOCK`) that make ``range(size)``, in order; the last may be shorter."""
    length = length or BLOCK
    return (slice(start, min(start + length, size)) for start in range(0, size, length))


@contextmanager
def temporary_file(what: str) -> Iterator[IO[bytes]]:
    """A file without a name, for ``what`` of a large pool, which is gone when it is closed and mapped no more.

    Raises:
        UserError: it cannot be made or written.
    """
    folder = os.environ.get("TMPDIR", "")
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile() as file:
            yield file
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(
            f"TMPDIR={folder!r}: {what} of a large pool cannot be written there ({reason}); "
            "set TMPDIR to a folder on a larger disk"
        ) from None


def new_array(size: int, kind: DTypeLike) -> np.ndarray:
    """An array (size,) of any content: in memory up to :data:`IN_MEMORY` bytes, else mapped to a temporary file.

    The file has no name, and is gone when the array is, or the process, also a killed one. Its room is reserved: a full
    disk would otherwise show as a SIGBUS at some later assignment.

    Raises:
        UserError: the disk of TMPDIR has no room, or there is none.
    """
    kind = np.dtype(kind)
    size_in_bytes = size * kind.itemsize
    if size_in_bytes <= IN_MEMORY:
        return np.empty(size, kind)
    with temporary_file(f"{size_in_bytes / 1e9:.3g} GB more of the scores") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size_in_bytes)
        else:
            file.truncate(size_in_bytes)
        mapped = mmap.mmap(file.fileno(), size_in_bytes)
    column: np.ndarray = np.ndarray(size, kind, buffer=mapped)
    return column


def filled(size: int, kind: DTypeLike, value: float) -> np.ndarray:
    """A column (size,) of one value."""
    column = new_array(size, kind)
    column[:] = value
    return column


def counted(size: int) -> np.ndarray:
    """The column 0, 1, 2, ..., (size,) int64."""
    column = new_array(size, np.int64)
    for block in blocks(size):
        column[block] = np.arange(block.start, block.stop)
    return column


def copied(values: np.ndarray) -> np.ndarray:
    """A column of the same type and values."""
    column = new_array(len(values), values.dtype)
    column[:] = values
    return column


def taken(values: np.ndarray, member: np.ndarray) -> np.ndarray:
    """``values[member]`` for a column of bool ``member``."""
    column = new_array(int(np.count_nonzero(member)), values.dtype)
    end = 0
    for block in blocks(len(values)):
        part = values[block][member[block]]
        column[end : end + len(part)] = part
        end += len(part)
    return column


def positions(member: np.ndarray) -> np.ndarray:
    """Where a column of bool is true, ascending, int64."""
    column = new_array(int(np.count_nonzero(member)), np.int64)
    end = 0
    for block in blocks(len(member)):
        part = np.flatnonzero(member[block])
        column[end : end + len(part)] = part + block.start
        end += len(part)
    return column


def counts(numbers: np.ndarray) -> np.ndarray:
    """How often each of the numbers from 0 to the largest occurs in a column of them, int64."""
    found = np.zeros(int(numbers.max(initial=-1)) + 1, dtype=np.int64)
    for block in blocks(len(numbers)):
        found += np.bincount(numbers[block], minlength=len(found))
    return found
