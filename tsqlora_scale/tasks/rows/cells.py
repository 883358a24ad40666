"""One grammar of cells for all readers: every plain cell is a text, and what is no text is written as one.

A number is written as Python and JSON write it (``1``, ``1.0``, ``0.1``), a truth value as ``true`` or ``false``; a
missing value and NaN are empty. So a file says the same as csv, as JSON and as parquet.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

#: A cell as files and hub datasets give it.
Cell = str | int | float | bool | Decimal | None


def cell_text(cell: str | int | float | bool | Decimal) -> str:
    """A single cell as text."""
    return str(cell).lower() if isinstance(cell, bool) else str(cell)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column's cells are texts as they lie there."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def texts_of(array: pa.Array, *, ids: bool = False) -> pa.Array | None:
    """The cells (N,) as texts; None where the type has no plain cells (lists, structs, maps, bytes).

    Args:
        ids: take dates, times and bytes, too, as Arrow writes them.

    Raises:
        pyarrow.ArrowException: bytes that are no text.
    """
    kind, types = array.type, pa.types
    if is_text(kind):
        return array
    if types.is_dictionary(kind):  # pandas' categories
        return texts_of(array.dictionary_decode(), ids=ids)
    if isinstance(kind, pa.BaseExtensionType):
        return _texts_of_extension(array, ids=ids)
    if types.is_floating(kind):
        return _texts_of_floats(array)
    if types.is_null(kind) or types.is_boolean(kind) or types.is_integer(kind):
        return pc.cast(array, pa.string())
    if types.is_decimal(kind):
        return _texts_of_decimals(array)
    if kind == pa.string_view() or (ids and (types.is_temporal(kind) or types.is_binary(kind))):
        return pc.cast(array, pa.string())
    return None


def _texts_of_decimals(array: pa.Array) -> pa.Array:
    texts = pc.cast(array, pa.string())
    if not pc.any(pc.match_substring(texts, "E")).as_py():
        return texts
    # Arrow writes small ones with an exponent, 0 too: 0E-18
    return pa.array([None if value is None else format(value, "f") for value in array.to_pylist()], pa.string())


def _texts_of_extension(array: pa.Array, *, ids: bool) -> pa.Array | None:
    name = array.type.extension_name
    if name == "arrow.uuid":
        cells = array.storage.to_pylist()
        return pa.array([None if cell is None else str(uuid.UUID(bytes=cell)) for cell in cells], pa.string())
    return texts_of(pc.cast(array.storage, pa.bool_()) if name == "arrow.bool8" else array.storage, ids=ids)


def _texts_of_floats(array: pa.Array) -> pa.Array:
    """The shortest text that reads as the same number of the column's width."""
    values = array.to_numpy(zero_copy_only=False)
    cells = values.tolist() if pa.types.is_float64(array.type) else values
    return pa.array([None if cell != cell else str(cell) for cell in cells], pa.string())


def json_of(array: pa.Array) -> pa.Array | None:
    """Lists of objects (N,) as JSON; None where the type has none. Texts are taken for JSON already.

    A struct has every key in every row: one without a value is left out, for the row's own object did not have it.
    """
    kind = array.type
    if pa.types.is_dictionary(kind):
        return json_of(array.dictionary_decode())
    if isinstance(kind, pa.BaseExtensionType):  # arrow.json, too: texts
        return json_of(array.storage)
    if is_text(kind) or pa.types.is_null(kind) or kind == pa.string_view():
        return pc.cast(array, pa.string())
    if not _is_list(kind):
        return None
    cells = (None if cell is None else _plain(cell, kind) for cell in array.to_pylist())
    # what JSON has no form for, as dates and bytes, as Python writes it
    return pa.array(
        [None if cell is None else json.dumps(cell, ensure_ascii=False, default=str) for cell in cells], pa.string()
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _plain(value: Any, kind: pa.DataType) -> Any:
    """A value of a type as JSON has it: without the keys that only other rows have, and what lies in it as JSON read.

    Data sets keep objects whose keys differ from row to row as JSON (``arrow.json``).
    """
    if value is None:
        return None
    if pa.types.is_struct(kind):
        inner = {kind.field(place).name: kind.field(place).type for place in range(kind.num_fields)}
        return {key: _plain(each, inner[key]) for key, each in value.items() if each is not None}
    if _is_list(kind):
        return [_plain(each, kind.value_type) for each in value]
    if pa.types.is_map(kind):
        return {str(key): _plain(each, kind.item_type) for key, each in value}
    if getattr(kind, "extension_name", "") == "arrow.json":
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value
