"""The rows of a file once more, with every column as it was given: to be written out again beside an answer."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tsqlora_scale.config.schema import TaskConfig
from tsqlora_scale.tasks.rows.readers import file_format, read_tables
from tsqlora_scale.tasks.rows.wanted import Wanted

#: Rows of a parquet file that are in memory at once.
ROWS = 4096


def given_tables(file: Path, cfg: TaskConfig) -> Iterator[pa.Table]:
    """The rows in order: columns of text for text formats (what is no text in json, as json), parquet's own types."""
    if file_format(file) != "parquet":
        names, quoting = cfg.dataset.column_names, cfg.dataset.quoting
        keys = given_names(file, cfg) if file_format(file) == "json" else None
        yield from read_tables(file, Wanted({}, others=True), column_names=names, quoting=quoting, keys=keys)
        return
    with pq.ParquetFile(file) as opened:
        for batch in opened.iter_batches(batch_size=ROWS):
            yield pa.Table.from_batches([batch])


def given_names(file: Path, cfg: TaskConfig) -> list[str]:
    """The names of the columns: of a json file the keys of all its rows, in the order in which they appear."""
    if file_format(file) == "json":
        return list(dict.fromkeys(key for record in given_records(file, cfg) for key in record))
    names: list[str] = next(iter(given_tables(file, cfg))).column_names
    return names


def given_records(file: Path, cfg: TaskConfig) -> Iterator[dict[str, Any]]:
    """The rows in order as JSON's objects: of a json file exactly its own."""
    if file_format(file) != "json":
        for table in given_tables(file, cfg):
            yield from table.to_pylist()
        return
    opener = gzip.open if file.name.lower().endswith(".gz") else open
    with opener(file, "rt", encoding="utf-8-sig", newline="\n") as lines:
        first = next((line for line in lines if line.strip()), "")
        if first.lstrip().startswith("["):
            yield from _parsed(first + lines.read())
        else:
            yield from (_parsed(line) for line in itertools.chain([first], lines) if line.strip())


def _parsed(text: str) -> Any:
    """JSON, in which Python's writers spell a missing number NaN."""
    return json.loads(text, parse_constant=lambda name: None if name == "NaN" else float(name))


class TableBlocks:
    """Tables of one schema as tables of the sizes that are asked for."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self._tables = tables
        self._rest: list[pa.Table] = []

    def take(self, rows: int) -> pa.Table:
        """The next rows, fewer only at the end."""
        while sum(map(len, self._rest)) < rows and (table := next(self._tables, None)) is not None:
            self._rest.append(table)
        joined = pa.concat_tables(self._rest)
        self._rest = [joined.slice(rows)]
        return joined.slice(0, rows)
