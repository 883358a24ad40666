"""Standard output and error that take whatever is printed: characters that they lack, and a reader that has left."""

from __future__ import annotations

import io
import sys
from typing import Any


class _LeftAlone(io.FileIO):
    """A file that takes what nobody reads any more (``… | head``) and drops it."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            return memoryview(data).nbytes


def take_whatever_is_printed() -> None:
    """Let no command die of printing.

    What the terminal's or the pipe's encoding lacks is written as an escape (``\\u0431``), and a pipe whose reader has
    gone swallows the rest. Streams that are not the process's own, such as a notebook's, only get the first.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper and isinstance(stream.buffer, io.BufferedWriter | io.FileIO):
            unbuffered = isinstance(stream.buffer, io.FileIO)  # python -u
            if isinstance(getattr(stream.buffer, "raw", stream.buffer), _LeftAlone):
                continue
            stream.flush()
            raw = _LeftAlone(stream.fileno(), "w", closefd=False)
            lenient = io.TextIOWrapper(
                raw if unbuffered else io.BufferedWriter(raw),  # type: ignore[arg-type]
                stream.encoding,
                "backslashreplace",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, lenient)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
