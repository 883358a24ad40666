"""Leave out what truncation would take from a very long text, before it is tokenised.

Tokenizers take words apart one by one: cut at a single blank between two words, a text gives the same tokens up to
there. So a part that gives more tokens than are kept gives the same ones as the whole. A text without such a blank
(base64, Chinese) is left whole, as there its tokens can depend on all of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

#: A blank between two words.
_BETWEEN = re.compile(r"(?<=\w) (?=\w)")
#: Tokens beyond those that are kept: the ones at a cut may differ where a tokenizer's pieces span words.
_MARGIN = 64
#: Characters that are looked at first, for a token and beside them; a text of less than four times that is not cut.
_CHARACTERS, _MORE = 8, 1024


def is_long(text: str, tokens: int) -> bool:
    """Whether it is worth while to cut a text of which ``tokens`` tokens are kept."""
    return len(text) > 4 * _first_size(tokens)


def head(text: str, tokens: int, length: Callable[[str], int]) -> str:
    """A beginning of the text that gives its first ``tokens`` tokens; the text itself where that cannot be said.

    Args:
        length: counts the tokens of a text.
    """
    if not is_long(text, tokens):
        return text
    size = _first_size(tokens)
    while size < len(text):
        cut = _BETWEEN.search(text, size)
        if cut is None:
            return text
        if length(text[: cut.start()]) >= tokens + _MARGIN:
            return text[: cut.start()]
        size = 4 * max(size, cut.start())
    return text


def tail(text: str, tokens: int, length: Callable[[str], int]) -> str:
    """An end of the text that gives its last ``tokens`` tokens; the text itself where that cannot be said."""
    if not is_long(text, tokens):
        return text
    size = _first_size(tokens)
    while size < len(text):
        cut = _BETWEEN.search(text, len(text) - size)
        if cut is not None and length(text[cut.end() :]) >= tokens + _MARGIN:
            return text[cut.end() :]
        size *= 4
    return text


def longest_end(
    text: str, offsets: Sequence[tuple[int, int]], make: Callable[[str], T], over: Callable[[T], int]
) -> T | None:
    """What is made of an end of the text, as long a one as lets it fit; None where its last token is too much.

    Args:
        offsets: the characters of its tokens, before which it may be cut.
        over: by how many tokens what is made is too long.
    """
    keep = len(offsets)
    while keep > 0:  # a cut inside a word can make other tokens of it: count again
        made = make(text[offsets[-keep][0] :])
        excess = over(made)
        if excess <= 0:
            return made
        keep = max(1, keep - excess) if keep > 1 else 0
    return None


def _first_size(tokens: int) -> int:
    return _CHARACTERS * tokens + _MORE
