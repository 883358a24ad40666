"""The rows of ``task.query``: how many there must be, what they are called, and that no held-out set has them too."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import compress
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsqlora_scale.common.disk_arrays import blocks
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import printable
from tsqlora_scale.tasks.rows.column_checks import SAMPLE_ID
from tsqlora_scale.tasks.rows.conversations import BESIDE_CONTENT, MalformedCell, Message, read_conversation
from tsqlora_scale.tasks.rows.origin import Origin
from tsqlora_scale.tasks.rows.wanted import TARGET_KEY

log = logging.getLogger(__name__)

KEY = "task.query"
#: Fewer rows say too little of a task; with more, train on them.
FEWEST, MOST = 10, 500
#: What goes before the ids of the query's rows, which join the pool's.
PREFIX = "query-"
#: Rows of text that are compared at once.
_ROWS = 2**16


def query_ids(ids: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """The ids of the query's rows, (n,), under names of their own."""
    return pc.binary_join_element_wise(PREFIX, pc.cast(ids, pa.string()), "")


def check_query(
    rows: datasets.Dataset,
    train: datasets.Dataset,
    sets: Mapping[str, datasets.Dataset],
    columns: Mapping[str, str],
    *,
    where: Origin,
) -> None:
    """Check the query's number of rows, their ids, and that it shares no text with a held-out set.

    What is chosen by rows that also judge the result would make its metrics too good.

    Args:
        rows: of the query.
        train: the pool.
        sets: the held-out sets by name.
        columns: of text by their keys, all of which must be equal for rows to be the same. Rows that ask the same and
            are answered otherwise are told of.

    Raises:
        UserError: naming the file and the row.
    """
    if not FEWEST <= len(rows) <= MOST:
        raise UserError(
            f"{KEY}: {where} has {len(rows)} rows; give {FEWEST} to {MOST} of the wanted task"
            + (", and train on the others" if len(rows) > MOST else "")
        )
    known = {text: place for place, text in enumerate(_texts(rows, columns.values()))}
    asks = [key != TARGET_KEY for key in columns]
    questions = {tuple(compress(text, asks)) for text in known} if any(asks) and not all(asks) else set()
    for name, others in sets.items():
        alike = 0
        for place, text in enumerate(_texts(others, columns.values())):
            if text in known:
                title = f"the held-out set {name!r}" if name else "the held-out set"
                raise UserError(
                    f"{KEY}: {where}, sample {_id(rows, known[text])}, is in {title}, too (sample "
                    f"{_id(others, place)}); metrics on what the data is chosen by would be too good: take it out of "
                    "one of them"
                )
            alike += tuple(compress(text, asks)) in questions
        if alike:
            log.warning(
                "%s: %s asks what %d of the %d held-out rows%s ask, too, with another answer; where one source has "
                "several answers, keep these on one side",
                *(KEY, printable(str(where)), alike, len(others), f" of {name!r}" if name else ""),
            )
    ours = pa.array(rows[SAMPLE_ID][:], pa.string())
    view = train.select_columns([SAMPLE_ID]).with_format("arrow")
    for block in blocks(len(view), _ROWS):
        clash = np.flatnonzero(pc.is_in(view[block][SAMPLE_ID], value_set=ours).to_numpy())
        if len(clash):
            raise UserError(
                f"{KEY}: the pool has a sample called {train[block.start + int(clash[0])][SAMPLE_ID]!r}, as is one of "
                f"the query's, before whose ids {PREFIX!r} goes; rename the pool's"
            )


def as_in_pool(
    rows: datasets.Dataset,
    train: datasets.Dataset,
    *,
    own_id: str | None,
    where: Origin,
    ours: Mapping[str, float] | None = None,
) -> datasets.Dataset:
    """The query's rows with the columns of the pool and their types, so that they can join it.

    Args:
        own_id: the data's own column of ids, which the query need not have; its cells are then empty.
        ours: what every row of the query has in columns of ours.

    Raises:
        UserError: a column is missing that an objective of one's own may read.
    """
    table, ours = rows.with_format("arrow")[:], ours or {}
    columns = {}
    for column in train.features.arrow_schema:
        if column.name in ours:
            columns[column.name] = pa.chunked_array([pa.array([ours[column.name]] * len(table), column.type)])
        elif column.name in table.column_names:
            with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):  # ids of another type
                columns[column.name] = table[column.name].cast(column.type)
        if column.name not in columns and column.name != own_id:
            raise UserError(
                f"{KEY}: {where} has no column {column.name!r} of {column.type} values, as the pool has; add it, for "
                "task.objective may read it"
            )
        columns.setdefault(column.name, pa.nulls(len(table), column.type))
    digest = hashlib.sha256(repr((rows._fingerprint, train._fingerprint)).encode()).hexdigest()[:16]
    info = datasets.DatasetInfo(features=train.features)
    return datasets.Dataset(pa.table(columns), info=info, fingerprint=digest)


def _id(rows: datasets.Dataset, place: int) -> str:
    return str(rows[place][SAMPLE_ID]).removeprefix(PREFIX)


def _texts(rows: datasets.Dataset, columns: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """The texts of every row, without differences of blanks and of case."""
    names = list(columns)
    view = rows.select_columns(names)
    for block in blocks(len(view), _ROWS):
        table = view[block]
        for cells in zip(*(table[name] for name in names), strict=True):
            yield tuple(_alike(cell or "") for cell in cells)


def _alike(text: str) -> str:
    """A text, or what is said in a conversation, however its JSON is written."""
    if text.lstrip().startswith("["):
        with contextlib.suppress(MalformedCell):
            turns = read_conversation(text)
            text = json.dumps([_told(turn) for turn in turns], sort_keys=True, ensure_ascii=False)
    return " ".join(text.split()).casefold()


def _told(turn: Message) -> list[Any]:
    """A turn without differences of blanks, and of keys that hold nothing."""
    return [turn["role"], " ".join(turn["content"].split()), *(turn.get(key) or None for key in BESIDE_CONTENT)]
