"""Text of others (samples, file names, values of a config) on a terminal: one line, bounded, without control."""

from __future__ import annotations

#: Joiners inside words and emoji: no control over anything, and some scripts need them.
_JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    """``text`` with every character escaped that moves the cursor, ends a line or turns the direction of writing.

    Escapes are Python's (``\\x1b``, ``\\n``, ``\\u202e``), also of bytes that were no UTF-8 (``\\udcff``).
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _JOINERS else repr(c)[1:-1] for c in text)


def shortened(text: str, limit: int) -> str:
    """``text``, or its beginning and its end with ``…`` between them: at most ``limit`` characters."""
    if len(text) <= limit:
        return text
    end = limit // 4
    return f"{text[: limit - end - 1]}…{text[len(text) - end :]}"


def shown(value: object, limit: int = 100) -> str:
    """A value as Python writes it, in at most ``limit`` characters."""
    if isinstance(value, str) and len(value) > limit:  # its repr is long, too, and may be very long
        return f"{shortened(repr(value[:limit]), limit)}"
    return shortened(repr(value), limit)
