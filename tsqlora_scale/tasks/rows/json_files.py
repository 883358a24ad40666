"""Rows of json and jsonl files: one object a line, or one array of objects."""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.tasks.rows import file_limits
from tsqlora_scale.tasks.rows.delimited_files import Row
from tsqlora_scale.tasks.rows.wanted import Wanted, check_names, require_columns


def json_rows(
    lines: Iterator[str], path: Path, wanted: Wanted, *, keys: Sequence[str] | None = None
) -> tuple[list[str], Iterator[Row]]:
    """The columns that are read, and their rows. The file's columns are the keys of the first rows.

    Args:
        keys: those of all rows, where they are known.

    Raises:
        UserError: no such column, no valid JSON, a list or an object where text is due, or a key that comes later
            while other columns than the wanted ones are read.
    """
    records = _json_records(lines, path)
    head: list[dict[str, Any]] = []
    characters, is_cut = 0, False
    for record, length in records:
        head.append(record)
        characters += length
        if len(head) >= file_limits.CHUNK_ROWS or characters >= file_limits.CHUNK_CHARACTERS:
            is_cut = True
            break
    if not head:
        raise UserError(f"{path}: the file is empty; it needs at least one row")
    present = list(dict.fromkeys(key for record in head for key in record)) if keys is None else list(keys)
    check_names(present, where=path)
    late = wanted.may_come_late(present) if is_cut and keys is None and not wanted.others else {}
    names = wanted.among([*present, *dict.fromkeys(late.values())], where=path)
    if wanted.others:
        names = present
    known, plain = set(present), wanted.plain()
    unseen = set(late.values())

    def rows() -> Iterator[Row]:
        for number, record in enumerate(itertools.chain(head, (record for record, _ in records)), 1):
            if unseen:
                unseen.difference_update(record)
            if wanted.others and not record.keys() <= known:
                new = next(key for key in record if key not in known)
                raise UserError(
                    f"{path}, row {number}: key {new!r} is in none of the first {len(head)} rows, whose keys are the "
                    "columns; put it into the first row (null where there is no value), or leave it out"
                )
            for name in plain:
                if isinstance(record.get(name), list | dict):
                    kind = "a list" if isinstance(record[name], list) else "an object"
                    raise UserError(
                        f"{path}, row {number}: column {name!r} holds {kind}; it must hold text or a number"
                    )
            yield [_json_text(record.get(name)) for name in names]
        if unseen:
            require_columns(present, {key: name for key, name in late.items() if name in unseen}, where=path)

    return names, rows()


def _json_records(lines: Iterator[str], path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Objects, and the characters that they took, about."""
    first = next((line for line in lines if line.strip()), "")
    records: Iterator[tuple[Any, int]]
    if first.lstrip().startswith("["):
        records = ((record, 0) for record in _loads(_whole(first, lines, path), path, ""))
    else:
        filled = (line for line in itertools.chain([first], lines) if line.strip())
        records = ((_loads(line, path, f", row {number}"), len(line)) for number, line in enumerate(filled, 1))
    for number, (record, length) in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f"{path}, row {number}: {shown(record)} is not an object of column names and values")
        yield record, length


def _whole(first: str, lines: Iterator[str], path: Path) -> str:
    """The text of an array that is written over many lines."""
    text = [first]
    characters = len(first)
    for line in lines:
        text.append(line)
        characters += len(line)
        if characters > file_limits.MOST_IN_JSON:
            raise UserError(
                f"{path}: an array longer than {file_limits.MOST_IN_JSON >> 20} MiB; write one object a line"
            )
    return "".join(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} twice in one object")
    return found


def _constant(name: str) -> float | None:
    """JSON has no such numbers, and Python's writers spell a missing value NaN."""
    return None if name == "NaN" else float(name)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)


def _loads(text: str, path: Path, where: str) -> Any:
    try:
        return _DECODER.decode(text.strip())
    except RecursionError:
        raise UserError(f"{path}{where}: not valid JSON (nested too deep); write one object a line") from None
    except ValueError as error:  # also numbers of thousands of digits
        raise UserError(f"{path}{where}: not valid JSON ({error}); write one object a line, or one array") from None


def _json_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
