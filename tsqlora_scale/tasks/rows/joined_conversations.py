"""Conversations that lie in several columns: a system prompt, what is asked, and what is to be said."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from tsqlora_scale.common.disk_arrays import blocks
from tsqlora_scale.tasks.rows.conversations import ASSISTANT, PROMPTS, WEIGHT, Message, read_cells, read_conversation
from tsqlora_scale.tasks.rows.origin import Origin
from tsqlora_scale.tasks.rows.row_ids import made_column
from tsqlora_scale.tasks.rows.wanted import COMPLETION_KEY, SYSTEM_KEY

#: Rows that are in memory at once.
_ROWS = 2**12


def joined(
    column: pa.ChunkedArray,
    name: str,
    parts: Mapping[str, tuple[str, pa.ChunkedArray]],
    *,
    where: Origin,
    kept: np.ndarray,
) -> pa.ChunkedArray:
    """Conversations (N,) as one column, each of the messages of its row's cells.

    Where there is a completion it alone is learned. A conversation that begins with a system prompt keeps that.

    Args:
        column: of conversations, called ``name``.
        parts: key -> name and cells of the others.
        where: the file or dataset, for messages.
        kept: the rows that count, (N,) bool; the others may hold anything, and become empty.

    Raises:
        UserError: naming file, row and column of a cell that is no list of messages.
    """
    systems = parts[SYSTEM_KEY][1] if SYSTEM_KEY in parts else None

    def cells() -> Iterator[pa.Array]:
        for block in blocks(len(column), _ROWS):
            asked = _read(column, name, block, where, kept)
            replies = _read(parts[COMPLETION_KEY][1], parts[COMPLETION_KEY][0], block, where, kept) if answers else {}
            begins = (
                {} if systems is None else dict(enumerate(systems.slice(block.start, len(kept[block])).to_pylist()))
            )
            texts: list[str | None] = [None] * len(kept[block])
            for place, messages in asked.items():
                given = messages if not answers else [_given(message) for message in messages]
                whole = _behind(begins.get(place), [*given, *replies.get(place, [])])
                texts[place] = json.dumps(whole, ensure_ascii=False)
            yield pa.array(texts, pa.string())

    answers = COMPLETION_KEY in parts
    return made_column(cells(), column.nbytes + sum(2 * part.nbytes for _, part in parts.values()))


def _read(
    column: pa.ChunkedArray, name: str, block: slice, where: Origin, kept: np.ndarray
) -> dict[int, list[Message]]:
    part = column.slice(block.start, block.stop - block.start)
    found = read_cells(part, name, where, kept[block], lambda cell: read_conversation(cell or "[]"), block.start)
    return {row - block.start: messages for row, messages in found}


def _given(message: Message) -> Message:
    return {**message, WEIGHT: 0} if message["role"] == ASSISTANT else message


def _behind(system: Any, messages: list[Message]) -> list[Message]:
    """The messages behind a system prompt, if there is one and they have none of their own."""
    if not system or not str(system).strip() or (messages and messages[0]["role"] in PROMPTS):
        return messages
    return [{"role": "system", "content": system}, *messages]
