"""Files that are there whole or not at all, and what goes wrong where a disk takes no more."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

#: What a full disk, a limit or a lost mount raises in what writes here.
WRITE_ERRORS = (OSError, SafetensorError)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to in the place of ``path``: flushed to disk and renamed at the end, removed after an error.

    Raises:
        OSError: when it cannot be flushed or renamed; ``path`` is what it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        fsync(partial)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def fsync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
