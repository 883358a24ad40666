"""Rows of tokens on disk: a folder that is there whole or not at all, mapped and not read.

Of every name (``input_ids``, ``targets``, ...) there are two files, all rows' values one behind the other and where
each row ends, and ``about.json`` says what they hold. It is written last, with the sum of every file, so that a folder
whose disk has lost something is known for what it is.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tsqlora_scale.common.disk_arrays import blocks
from tsqlora_scale.common.files import fsync
from tsqlora_scale.tasks.objectives.objective import Tokens

ABOUT = "about.json"
#: Names whose values are token ids; of all others those that are small.
IDS, SMALL = ("input_ids", "targets"), ("attention_mask", "token_type_ids", "learned")
#: Bytes that are summed up together.
_PIECE = 2**24


class DamagedStore(ValueError):
    """A folder that does not hold what it should; the message says what is wrong."""


@dataclass(frozen=True)
class Packed:
    """Some rows' values of one name.

    Attributes:
        lengths: of the rows, (n,) int64.
        values: of all of them, (lengths.sum(),).
    """

    lengths: np.ndarray
    values: np.ndarray


def packed(tokens: Tokens, *, vocabulary: int) -> dict[str, Packed]:
    """Rows as flat arrays, each of the smallest type that holds what its name stands for.

    Args:
        vocabulary: one more than the largest token id.
    """
    found = {}
    for name, rows in tokens.items():
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        values = np.fromiter((value for row in rows for value in row), np.int64, int(lengths.sum()))
        kind = np.iinfo(kind_of(name, vocabulary))
        assert not len(values) or (values.min() >= kind.min and values.max() <= kind.max), name
        found[name] = Packed(lengths, values.astype(kind.dtype))
    return found


def kind_of(name: str, vocabulary: int) -> np.dtype:
    """The type of a name's values."""
    if name in SMALL:
        return np.dtype("u1")
    return np.dtype("<u2") if name in IDS and vocabulary <= 2**16 else np.dtype("<i4")


class StoreWriter:
    """Writes a store into a folder of its own, block by block; :meth:`close` makes it one.

    Raises:
        OSError: there is no room.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._rows = folder, 0
        self._files: dict[str, Any] = {}
        self._ends: dict[str, int] = {}
        self._kinds: dict[str, str] = {}
        self._sums: dict[str, int] = {}

    def write(self, block: dict[str, Packed]) -> None:
        """Append rows: the same names in every block."""
        for name, part in block.items():
            if name not in self._kinds:
                assert not self._rows, f"{name} is no name of the first rows"
                self._kinds[name], self._ends[name] = part.values.dtype.str, 0
                for file in (f"{name}.values", f"{name}.ends"):
                    self._files[file], self._sums[file] = (self._folder / file).open("wb"), 0
            ends = self._ends[name] + np.cumsum(part.lengths, dtype="<i8")
            self._ends[name] = int(ends[-1]) if len(ends) else self._ends[name]
            self._append(f"{name}.values", part.values)
            self._append(f"{name}.ends", ends)
        self._rows += len(next(iter(block.values())).lengths)

    def close(self, about: dict[str, Any]) -> None:
        """Flush all of it to disk, and say what it is."""
        self.abandon()
        for file in self._sums:
            fsync(self._folder / file)
        columns = {name: {"type": kind, "values": self._ends[name]} for name, kind in self._kinds.items()}
        tree = {**about, "rows": self._rows, "columns": columns, "sums": self._sums}
        (self._folder / ABOUT).write_text(json.dumps(tree, indent=1), encoding="utf-8")
        fsync(self._folder / ABOUT)
        fsync(self._folder)

    def abandon(self) -> None:
        """Close the files as they are."""
        for file in self._files.values():
            file.close()

    def _append(self, file: str, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values).data
        self._files[file].write(data)
        self._sums[file] = zlib.crc32(data, self._sums[file])


class TokenStore:
    """The rows of a folder, mapped: a process's own memory does not grow with them.

    Args:
        rows: how many there must be.

    Raises:
        DamagedStore: the folder holds something else.
    """

    def __init__(self, folder: Path, *, rows: int) -> None:
        self.folder = folder
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            columns, sums = about["columns"], about["sums"]
            if about["rows"] != rows:
                raise DamagedStore(f"{ABOUT} speaks of {about['rows']} rows, and there are {rows}")
            self._columns = {
                name: (
                    _mapped(folder / f"{name}.values", column["type"], column["values"], sums[f"{name}.values"]),
                    _mapped(folder / f"{name}.ends", "<i8", rows, sums[f"{name}.ends"]),
                )
                for name, column in columns.items()
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedStore(str(error) or type(error).__name__) from None

    def rows(self, indices: Sequence[int] | np.ndarray) -> Tokens:
        """Some rows, in the order that is asked for."""
        found: Tokens = {name: [] for name in self._columns}
        for index in map(int, indices):
            for name, (values, ends) in self._columns.items():
                begin = ends[index - 1] if index else 0
                found[name].append(values[begin : ends[index]].tolist())
        return found


def _mapped(path: Path, kind: DTypeLike, size: int, checksum: int) -> np.ndarray:
    kind = np.dtype(kind)
    found = path.stat().st_size
    if found != size * kind.itemsize:
        raise DamagedStore(f"{path.name} has {found} bytes, and should have {size * kind.itemsize}")
    if not size:
        return np.empty(0, kind)
    values: np.ndarray = np.memmap(path, kind, mode="r", shape=(size,))
    total = 0
    for piece in blocks(size, max(_PIECE // kind.itemsize, 1)):
        total = zlib.crc32(values[piece].data, total)
    if total != checksum:
        raise DamagedStore(f"the contents of {path.name} are not those that were written")
    return values
