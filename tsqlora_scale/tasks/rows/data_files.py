"""Which files a key of ``task.dataset`` names: one, several, or those that a pattern matches."""

# ruff: noqa: PTH111, PTH112, PTH113, PTH118, PTH207 - os.path says no where pathlib raises, of names that no disk takes

from __future__ import annotations

import collections
import difflib
import glob
import os
from pathlib import Path

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config import locations


def find_files(value: str | list[str], folder: str | None, *, key: str) -> list[Path]:
    """The files in the order in which they are read: of a list as it is written, of a pattern by their names.

    Args:
        value: names or patterns (``*``, ``?``, ``[...]``): absolute, beginning with ``~``, or relative to ``folder``.
        folder: ``task.dataset.path``; None is the current folder.
        key: the config key that holds ``value``, for messages.

    Raises:
        UserError: no such folder, no such file, or a file twice.
    """
    base = Path(os.path.expanduser(locations.resolve(folder, key="task.dataset.path"))) if folder is not None else None
    found = [
        path for entry in ([value] if isinstance(value, str) else value) for path in _find(entry, base, folder, key)
    ]
    twice = next((path for path, count in collections.Counter(found).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{key}={value!r}: names {str(twice)!r} twice; name each file once")
    return found


def _find(entry: str, base: Path | None, folder: str | None, key: str) -> list[Path]:
    named = Path(os.path.expanduser(entry))  # a home that nobody has stays as it is written
    path = named if base is None else base / named
    if os.path.isfile(path):
        return [path]
    pattern = str(named) if base is None else os.path.join(glob.escape(str(base)), named)
    matches = sorted(match for match in map(Path, glob.glob(pattern, recursive=True)) if os.path.isfile(match))
    if matches:
        return matches
    if base is not None and not os.path.isdir(base):
        raise UserError(f"task.dataset.path={folder!r}: no such folder; give the folder that holds the data files")
    where = path.parent if str(path.parent) != "." else Path.cwd()
    if os.path.lexists(path):
        what = "a folder" if os.path.isdir(path) else "no regular file"
        raise UserError(f"{key}={entry!r}: is {what} in {where}; give a file of that folder")
    if glob.has_magic(str(named)):
        raise UserError(f"{key}={entry!r}: matches no file in {base or Path.cwd()}; check the pattern")
    names = [p.name for p in where.iterdir()] if os.path.isdir(where) else []
    near = difflib.get_close_matches(path.name, names, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else "give a file of that folder"
    raise UserError(f"{key}={entry!r}: no such file in {where}; {hint}")
