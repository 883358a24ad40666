"""Rows of csv and tsv files, and what a quote means in them (``task.dataset.quoting``)."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, cast

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown
from tsqlora_scale.tasks.rows import file_limits

Row = list[str | None]
Quoting = Literal["auto", "none", "double"]


def delimited_rows(lines: Iterator[str], path: Path, *, tabs: bool, quoting: Quoting) -> Iterator[list[str]]:
    """Fields of every row that is not empty, the header's first.

    Args:
        tabs: fields are separated by tabs, not by commas.
        quoting: ``double`` is RFC 4180, ``none`` takes a quote as a character like any other, ``auto`` is the first
            for csv and the second for tsv.

    Raises:
        UserError: naming the line; or, of ``auto``, a tsv with fields that a writer of quotes has written.
    """
    separator = "\t" if tabs else ","
    if quoting == "double" or (quoting == "auto" and not tabs):
        return _quoted(lines, path, separator)
    rows = _as_written(lines, separator)
    return _without_signs(rows, path) if quoting == "auto" else rows


def _as_written(lines: Iterator[str], separator: str) -> Iterator[list[str]]:
    """GLUE's convention: a separator always separates, and a quote is a character like any other."""
    for line in lines:
        line = line.rstrip("\r\n")
        if line:
            yield line.split(separator)


def _quoted(lines: Iterator[str], path: Path, separator: str) -> Iterator[list[str]]:
    """RFC 4180. Strict: otherwise one unbalanced quote swallows the rows up to the next."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    limit = csv.field_size_limit(
        file_limits.MOST_IN_A_LINE
    )  # the default refuses documents of more than 131,072 characters
    try:
        yield from (row for row in reader if row)
    except csv.Error as error:
        if "new-line" in str(error):
            raise UserError(
                f"{path}, line {reader.line_num}: a carriage return in a field without quotes; save the file with \\n "
                "as line end, or quote the field"
            ) from None
        other = "or save the file as tsv, where quotes have no meaning, " if separator == "," else ""
        raise UserError(
            f"{path}, line {reader.line_num}: {error}; quote fields that hold a quote and double the quote inside, "
            f"{other}or set task.dataset.quoting=none"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _without_signs(rows: Iterator[list[str]], path: Path) -> Iterator[list[str]]:
    """The rows, none of which another writer has quoted: pandas quotes fields with a quote, a tab or a line end."""
    for number, row in enumerate(rows):
        for field in row:
            if field[:1] == '"' and (_is_doubled(field) or (number == 0 and len(field) > 2 and field[-1] == '"')):
                where = f"row {number}" if number else "the header"
                raise UserError(
                    f"{path}, {where}: the field {shown(field, 60)} is quoted as in a csv, and in a tsv quotes are "
                    "characters like any other; set task.dataset.quoting=double to read them as pandas writes them, "
                    "or =none to keep them"
                )
        yield row


def _is_doubled(field: str) -> bool:
    """Whether a field is enclosed in quotes and every quote inside is doubled, and there is one."""
    inside = field[1:-1]
    return len(field) > 3 and field[-1] == '"' and '"' in inside and '"' not in inside.replace('""', "")


def header_and_rows(
    rows: Iterator[list[str]], path: Path, column_names: Sequence[str] | None, *, quotes: bool
) -> tuple[list[str], Iterator[Row]]:
    """The columns' names, and the rows below them.

    Args:
        column_names: of a file without a header row.
        quotes: whether quotes have a meaning, for messages.

    Raises:
        UserError: no header, a row of another number of fields.
    """
    names = list(column_names) if column_names else next(rows, None)
    if names is None:
        raise UserError(f"{path}: the file is empty; it needs a header and at least one row")
    if any("\r" in name for name in names):
        raise UserError(f"{path}: a carriage return inside the header; save the file with \\n as line end")
    origin = "task.dataset.column_names gives" if column_names else "the header has"

    def checked() -> Iterator[Row]:
        for number, row in enumerate(rows, 1):
            if len(row) != len(names):
                opens = not quotes and any(field[:1] == '"' for field in row)
                remedy = "task.dataset.column_names" + (", and task.dataset.quoting=double" if opens else "")
                raise UserError(
                    f"{path}, row {number}: {len(row)} fields where {origin} {len(names)} ({', '.join(names)}); "
                    f"mend the row, or check the separator and {remedy}"
                )
            yield cast(Row, row)

    return names, checked()
