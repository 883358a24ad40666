"""``sampling.file``: scores of samples that were made elsewhere, or a list of those to train on, by their ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tsqlora_scale.common.disk_arrays import blocks, filled
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.tasks.rows.data_files import find_files
from tsqlora_scale.tasks.rows.excluded_ids import COLUMNS
from tsqlora_scale.tasks.rows.readers import read_tables
from tsqlora_scale.tasks.rows.wanted import Wanted

KEY = "sampling.file"
#: Columns that may hold the scores, the first of them that is there; ours are called ``quality``.
SCORES = ("score", "quality")


@dataclass(frozen=True)
class RatedIds:
    """What a file says of samples.

    Attributes:
        value: of the key, for messages.
        scores: by id, the higher the better; of a list 1 for every id on it.
        is_list: whether it lists samples to train on, and says nothing of the others.
    """

    value: str
    scores: dict[str, float]
    is_list: bool

    def ratings(self, ids: Sequence[str], *, others: int = 0) -> np.ndarray:
        """Scores (N,) float64 of a pool's samples, the higher the better; 0 of those that are not on a list.

        A file of scores may hold more than the pool has, as of one that is cut short. A list may not: it says what is
        trained on, and should not mean less than it says.

        Args:
            ids: of the samples, (N,).
            others: how many at the end need no score, and get the best.

        Raises:
            UserError: naming samples without a score, or ids of a list that are no sample's.
        """
        size = len(ids) - others
        scores, known, missing = filled(len(ids), np.float64, 0.0), set[str](), list[str]()
        # blanks about an id of the file count where the pool has an id with them, and else not
        bare = {name.strip(): name for name in self.scores if name.strip() not in self.scores}
        if bare:
            whole = {str(name) for block in blocks(size, 2**16) for name in ids[block] if str(name) in self.scores}
            bare = {name: own for name, own in bare.items() if own not in whole}
        for block in blocks(size, 2**16):
            for row, identity in enumerate(ids[block], block.start):
                name = str(identity) if str(identity) in self.scores else bare.get(str(identity), "")
                if name:
                    scores[row] = self.scores[name]
                    known.add(name)
                elif not self.is_list:
                    missing.append(str(identity))
        if missing:
            raise UserError(
                f"{KEY}={self.value!r}: has no score for {len(missing)} of the pool's {size} samples "
                f"({_named(missing)}); score them, or leave them out by task.dataset.exclude, or check "
                "task.dataset.id_column"
            )
        if self.is_list and len(known) < len(self.scores):
            unknown = [name for name in self.scores if name not in known]
            raise UserError(
                f"{KEY}={self.value!r}: {len(unknown)} of its {len(self.scores)} ids are no sample's of the pool "
                f"({_named(unknown)}); take them out of the file, or check task.dataset.id_column"
            )
        scores[size:] = scores[:size].max(initial=0.0)
        return scores


def read_rated_ids(value: str) -> RatedIds:
    """A list of ids (a ``.txt``, an id a line, or a table without scores), or a table with a column of scores.

    Args:
        value: the file, found from the current folder, or a pattern of several.

    Raises:
        UserError: no such file, no column of ids, a score that is no number, or an id twice.
    """
    scores: dict[str, float] = {}
    kinds: set[bool] = set()
    for path in find_files([value], None, key=KEY):
        found, is_list = _lines(path) if path.suffix.lower() == ".txt" else _table(path)
        kinds.add(is_list)
        for number, (name, score) in enumerate(found, 1):
            if name in scores:
                raise UserError(f"{path}, row {number}: the id {shown(name)} is there twice; give each id once ({KEY})")
            scores[name] = score
    if not scores:
        raise UserError(f"{KEY}={value!r}: holds no ids; name a file with an id a row")
    if len(kinds) > 1:
        raise UserError(f"{KEY}={value!r}: some of its files have scores and some have none; give them all, or none")
    return RatedIds(value, scores, kinds.pop())


def _lines(path: Path) -> tuple[list[tuple[str, float]], bool]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return [(line, 1.0) for line in lines if line.strip()], True


def _table(path: Path) -> tuple[list[tuple[str, float]], bool]:
    wanted = Wanted({}, {f"{KEY}: {name}": name for name in (*COLUMNS, *SCORES)})
    found: list[tuple[str, float]] = []
    column = None
    for table in read_tables(path, wanted):
        id_column = next((name for name in COLUMNS if name in table.column_names), None)
        column = next((name for name in SCORES if name in table.column_names), None)
        if id_column is None:
            raise UserError(
                f"{path}: has no column {' or '.join(map(repr, COLUMNS))}; call the column of ids so ({KEY})"
            )
        cells = table.column(column).to_pylist() if column else [None] * len(table)
        for name, cell in zip(table.column(id_column).to_pylist(), cells, strict=True):
            row = len(found) + 1
            if name is None or not name.strip():
                raise UserError(f"{path}, row {row}: the id is empty; give every row an id ({KEY})")
            found.append((name, _number(cell, column, path, row) if column else 1.0))
    return found, column is None


def _number(cell: str | None, column: str, path: Path, row: int) -> float:
    try:
        number = float(cell or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{path}, row {row}: {column} {shown(cell or '')} is no finite number; mend the row ({KEY})")
    return number


def _named(ids: Sequence[str]) -> str:
    return ", ".join(shown(name, 40) for name in ids[:5]) + (", ..." if len(ids) > 5 else "")
