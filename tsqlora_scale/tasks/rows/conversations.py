"""Conversations in cells: JSON lists of messages, in OpenAI's words or ShareGPT's, and the tools beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from tsqlora_scale.common.disk_arrays import new_array
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.tasks.rows.origin import Origin

#: A turn: ``role``, ``content`` (a text), and whatever else a template may read.
Message = dict[str, Any]

ASSISTANT = "assistant"
#: Who says at the beginning how to answer, in OpenAI's older words and in its newer ones.
PROMPTS = ("system", "developer")
#: A key of an assistant's turn by which it is not learned where its value is 0, as in OpenAI's files.
WEIGHT = "weight"
#: ShareGPT's words for who speaks. All others are taken as they are: a template knows which it has.
_ROLES = {
    "human": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bot": ASSISTANT,
    "model": ASSISTANT,
    "function_call": ASSISTANT,
    "observation": "tool",
    "function_response": "tool",
}
#: Turns of these hold something; a system's may be empty, and so may what a tool gives.
_FILLED = ("user", ASSISTANT)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
#: What an assistant's turn can hold beside its content.
BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


class MalformedCell(ValueError):
    """A cell that is no conversation, or no list of tools; the message says why."""


def read_conversation(cell: str) -> list[Message]:
    """The messages of a cell, every content a text; a key without a value is left out.

    Raises:
        MalformedCell: it is no list of messages.
    """
    value = _json(cell)
    if not isinstance(value, list):
        raise MalformedCell(f"holds {shown(value, 40)}; it must hold a list of messages")
    return [_message(number, turn) for number, turn in enumerate(value, 1)]


def read_tools(cell: str | None) -> list[dict[str, Any]] | None:
    """The schemas of a cell; None where it is empty.

    Raises:
        MalformedCell: it is no list of objects.
    """
    value = _json(cell) if cell and cell.strip() else None
    tools = [_json(tool) if isinstance(tool, str) else tool for tool in value] if isinstance(value, list) else value
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise MalformedCell(f"holds {shown(value, 40)}; it must hold a list of JSON schemas, or nothing")
    return tools or None


def emptiness(messages: list[Message]) -> str | None:
    """Why nothing can be learned of a conversation; None where something can."""
    if not any(message["role"] == ASSISTANT for message in messages):
        return "has no turn of the assistant"
    if not any(map(is_learned, messages)):
        return "has no turn of the assistant that is learned: all of them weigh 0, or are given"
    for number, message in enumerate(up_to_last_answer(messages), 1):
        if message["role"] in _FILLED and not is_filled(message):
            return f"has an empty message {number} ({message['role']})"
    return None


def is_filled(message: Message) -> bool:
    """Whether a turn holds anything."""
    return bool(message["content"].strip() or any(message.get(key) for key in BESIDE_CONTENT))


def is_learned(message: Message) -> bool:
    """Whether a turn is the assistant's, and its weight, if it has one, not 0."""
    return message["role"] == ASSISTANT and message.get(WEIGHT) != 0


def up_to_last_answer(messages: list[Message]) -> list[Message]:
    """The turns up to the last one that is learned: of what follows it nothing is."""
    last = max(place for place, message in enumerate(messages) if is_learned(message))
    return messages[: last + 1]


def check_conversations(
    column: pa.ChunkedArray, name: str, *, where: Origin, kept: np.ndarray, may_be_empty: bool
) -> np.ndarray:
    """Check that every cell is a conversation of which something can be learned.

    Args:
        column: N cells as texts.
        name: the column's name, for messages.
        where: the file or dataset, for messages.
        kept: the rows that count, (N,) bool; the others may hold anything.
        may_be_empty: accept conversations of which nothing can be learned.

    Returns:
        Which rows hold something to be learned, (N,) bool.

    Raises:
        UserError: naming file, row and column.
    """
    found = new_array(len(column), bool)
    for row, messages in read_cells(column, name, where, kept, lambda cell: read_conversation(cell or "[]")):
        reason = emptiness(messages)
        if reason is not None and not may_be_empty:
            raise UserError(
                f"{where.row(row)}: the conversation in column {name!r} {reason}; mend it, or set "
                "task.dataset.drop_empty=true to leave such rows out"
            )
        found[row] = reason is None
    return found


def check_tools(column: pa.ChunkedArray, name: str, *, where: Origin, kept: np.ndarray) -> None:
    """Check that every cell is a list of tools, or empty; arguments as of :func:`check_conversations`.

    Raises:
        UserError: naming file, row and column.
    """
    for _ in read_cells(column, name, where, kept, read_tools):
        pass


def answerable(column: pa.ChunkedArray, name: str, *, where: Origin) -> tuple[pa.Array, np.ndarray]:
    """Conversations that are to be answered: as they are before the last answer, or whole where none ends them.

    Returns:
        Them as cells (N,), with a placeholder as the last turn, and which of them ask for anything, (N,) bool; in the
        others' place stands something that can be put through a template.

    Raises:
        UserError: naming file, row and column of a cell that is no conversation.
    """
    cells, filled = [], new_array(len(column), bool)
    everything = np.ones(len(column), bool)
    for row, messages in read_cells(column, name, where, everything, lambda cell: read_conversation(cell or "[]")):
        given = messages[:-1] if messages and messages[-1]["role"] == ASSISTANT else messages
        # a tool's result may be empty, as in training
        ends = bool(given) and (given[-1]["role"] not in _FILLED or is_filled(given[-1]))
        filled[row] = ends and any(map(is_filled, given))
        if not filled[row]:
            given = [{"role": "user", "content": "."}]
        cells.append(json.dumps([*given, {"role": ASSISTANT, "content": "."}], ensure_ascii=False))
    return pa.array(cells, pa.string()), filled


def read_cells(
    column: pa.ChunkedArray,
    name: str,
    where: Origin,
    kept: np.ndarray,
    read: Callable[[str | None], Any],
    first: int = 0,
) -> Iterator[tuple[int, Any]]:
    """Numbers and contents of the rows that are kept, chunk by chunk: the column may be larger than memory.

    Args:
        column: N cells, called ``name`` in messages.
        kept: which rows count, (N,) bool.
        read: what is made of a cell.
        first: number of the first row.

    Raises:
        UserError: naming file, row and column of a cell of which ``read`` makes nothing.
    """
    row = first
    for chunk in column.chunks:
        for cell in chunk:
            if kept[row - first]:
                try:
                    yield row, read(cell.as_py())
                except MalformedCell as error:
                    raise UserError(f"{where.row(row)}: column {name!r} {error}") from None
                except UnicodeDecodeError:
                    raise UserError(f"{where.row(row)}: column {name!r} holds bytes that are no UTF-8") from None
            row += 1


def _json(cell: str) -> Any:
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise MalformedCell(f"holds {shown(cell, 40)}, which is no JSON ({reason}); write a list of objects") from None
    if _SURROGATE.search(cell):  # a pair is one character, half of one is none
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise MalformedCell(f"holds {shown(cell, 40)}, with half of a surrogate pair; mend the text") from None
    return found


def _message(number: int, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise MalformedCell(f"holds {shown(turn, 40)} as message {number}; it must be an object with role and content")
    found = {key: value for key, value in turn.items() if value is not None}
    role, content = found.pop("role", None), found.pop("content", None)
    if role is None:
        role, content = found.pop("from", None), found.pop("value", None)
    if not isinstance(role, str) or not role:
        raise MalformedCell(f"has a message {number} without a role; give it role and content, or from and value")
    if role == "function_call" and "tool_calls" not in found:
        return {"role": ASSISTANT, "content": "", "tool_calls": [_call(number, content)], **found}
    return {"role": _ROLES.get(role, role), "content": _text(number, content), **found}


def _call(number: int, content: Any) -> Any:
    """ShareGPT's call of a tool, which is written as its turn's text."""
    call = _json(content) if isinstance(content, str) else content
    if not isinstance(call, dict):
        raise MalformedCell(f"has a message {number} whose call of a tool is no object with name and arguments")
    return {"type": "function", "function": call}


def _text(number: int, content: Any) -> str:
    """A content as text: parts of text follow one another, and a tool's object is written as JSON."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
        if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
            raise MalformedCell(f"has a message {number} of other parts than text; only text can be learned")
        return "".join(part["text"] for part in parts)
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
