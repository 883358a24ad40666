"""``task.dataset.exclude``: samples that a user has taken out of the pool, by their ids."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tsqlora_scale.common.disk_arrays import filled
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.tasks.rows.column_checks import SAMPLE_ID
from tsqlora_scale.tasks.rows.data_files import find_files
from tsqlora_scale.tasks.rows.readers import read_tables
from tsqlora_scale.tasks.rows.wanted import Wanted

KEY = "task.dataset.exclude"
#: Columns that may hold the ids, the first of them that is there.
COLUMNS = (SAMPLE_ID, "id")


def read_ids(value: str) -> pa.Array:
    """The ids that a file lists, or several, each once and as it is written: lines of a ``.txt``, else a column of a
    table. None at all where all are tables with a column of ids and no row, as an audit that has found nothing writes.

    Args:
        value: the file, found from the current folder, or a pattern of several.

    Raises:
        UserError: no such file, no column of ids, or an empty one.
    """
    ids: list[str | None] = []
    paths = find_files([value], None, key=KEY)
    for path in paths:
        ids += _lines(path) if path.suffix.lower() == ".txt" else _column(path)
    given = [text for text in ids if text is not None and text.strip()]
    if not given and (ids or any(path.suffix.lower() == ".txt" for path in paths)):
        raise UserError(f"{KEY}={value!r}: holds no ids; leave the key out to exclude nothing")
    return pa.array(list(dict.fromkeys(given)), pa.string())


def _lines(path: Path) -> list[str | None]:
    try:
        return list(path.read_text(encoding="utf-8-sig").splitlines())
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _column(path: Path) -> list[str | None]:
    ids: list[str | None] = []
    wanted = Wanted({}, {f"{KEY}: {name}": name for name in COLUMNS})
    for table in read_tables(path, wanted, may_be_empty=True):
        name = next((name for name in COLUMNS if name in table.column_names), None)
        if name is None:
            break
        ids += table.column(name).to_pylist()
    else:
        return ids
    raise UserError(f"{path}: has no column {' or '.join(map(repr, COLUMNS))}; call the column of ids so ({KEY})")


def not_excluded(ids: pa.ChunkedArray | pa.Array, excluded: pa.Array, *, value: str, where: object) -> np.ndarray:
    """Which rows stay, (N,) bool. Blanks about an id count where the pool has an id with them, and else not.

    Args:
        ids: of the pool, (N,) texts.
        excluded: ids to leave out.
        value: of the key, for messages.
        where: the pool, for messages.

    Raises:
        UserError: naming ids that the pool does not have, or nothing would stay.
    """
    stays = filled(len(ids), bool, True)
    found = _leave_out(ids, excluded, stays)
    unknown = [text for text in excluded.to_pylist() if text not in found]
    if any(text != text.strip() for text in unknown):
        found = _leave_out(ids, pa.array([text.strip() for text in unknown], pa.string()), stays)
        unknown = [text for text in unknown if text.strip() not in found]
    if unknown:
        named = ", ".join(shown(text, 40) for text in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise UserError(
            f"{KEY}={value!r}: {len(unknown)} of its {len(excluded)} ids are no sample's of {where} ({named}); "
            "take them out of the file, or check task.dataset.id_column"
        )
    if not stays.any():
        raise UserError(f"{KEY}={value!r}: leaves no row of {where}; the pool needs at least one")
    return stays


def _leave_out(ids: pa.ChunkedArray | pa.Array, excluded: pa.Array, stays: np.ndarray) -> set[str]:
    """Mark the rows of some ids; those that there are."""
    found: set[str] = set()
    row = 0
    for chunk in ids.chunks if isinstance(ids, pa.ChunkedArray) else [ids]:
        inside = pc.is_in(chunk, value_set=excluded.cast(chunk.type))
        found.update(chunk.filter(inside).to_pylist())
        stays[row : row + len(chunk)] &= ~inside.to_numpy(zero_copy_only=False)
        row += len(chunk)
    return found


def digest_of(excluded: pa.Array | None) -> str:
    """A digest of what is left out, for the data set's own fingerprint."""
    return "" if excluded is None else hashlib.sha256(repr(excluded.to_pylist()).encode()).hexdigest()
