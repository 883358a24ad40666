"""Which columns of a file a task reads; the others may hold anything."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import TaskConfig

ID_KEY, LABEL_KEY, WEIGHT_KEY = "task.dataset.id_column", "task.label", "task.dataset.weight"
MESSAGES_KEY, TOOLS_KEY, INPUT_KEY = "task.messages", "task.tools", "task.input"
COMPLETION_KEY, SYSTEM_KEY = "task.completion", "task.system"
SOURCE_KEY, TARGET_KEY = "task.source", "task.target"
#: Keys of columns of lists of objects, which are read as JSON.
STRUCTURED_KEYS = (MESSAGES_KEY, TOOLS_KEY, COMPLETION_KEY)
#: Keys of columns that may be empty in any row.
EMPTY_KEYS = (TOOLS_KEY, INPUT_KEY)
#: Keys of columns that a file's first rows need not have.
LATE_KEYS = (*EMPTY_KEYS, SYSTEM_KEY)


def text_columns(cfg: TaskConfig) -> dict[str, str]:
    """Config key -> name of every column of text, or of conversations, that the task reads."""
    if cfg.messages is not None:
        named = {MESSAGES_KEY: cfg.messages, TOOLS_KEY: cfg.tools}
    else:
        named = {SOURCE_KEY: cfg.source, INPUT_KEY: cfg.input, TARGET_KEY: cfg.target}
    if cfg.type in ("classification", "regression"):
        return {f"task.text[{i}]": name for i, name in enumerate(cfg.text)}
    return {key: name for key, name in named.items() if name is not None}


def joined_columns(cfg: TaskConfig) -> dict[str, str]:
    """Those that become a part of the column of conversations when it is read."""
    named = {COMPLETION_KEY: cfg.completion, SYSTEM_KEY: cfg.system}
    return {key: name for key, name in named.items() if name is not None}


@dataclass(frozen=True)
class Wanted:
    """Columns that a task reads.

    Attributes:
        required: config key -> name.
        optional: likewise, of columns that are read where they are there.
        others: keep the other columns, too, as far as a data set can hold them: an objective of one's own may read
            any.
    """

    required: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)
    others: bool = False

    def keys(self) -> dict[str, str]:
        """Name of a column -> the key that names it."""
        return {name: key for key, name in [*self.optional.items(), *self.required.items()]}

    def plain(self) -> list[str]:
        """Names of the columns of which every cell is a text, a number or a truth value."""
        return [name for name, key in self.keys().items() if key not in STRUCTURED_KEYS]

    def may_come_late(self, present: Sequence[str]) -> dict[str, str]:
        """Config key -> name of the required columns that a file's first rows lack and any row may leave empty."""
        missing = {key: name for key, name in self.required.items() if key in LATE_KEYS and name not in present}
        # one that is nearly there is a slip of the pen, which need not wait for the end of a large file
        return {key: name for key, name in missing.items() if not difflib.get_close_matches(name, present, 1, 0.85)}

    def among(self, present: Sequence[str], *, where: object) -> list[str]:
        """The wanted columns of a file, in its order.

        Args:
            present: the file's columns.
            where: the file or dataset, for messages.

        Raises:
            UserError: a required one is not there (naming the key and the nearest that is), or a wanted one twice.
        """
        require_columns(present, self.required, where=where)
        names = self.keys()
        twice = next((name for name in names if present.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{where}: the column {twice!r} is there twice; rename one")
        return [name for name in present if name in names]


def require_columns(present: Sequence[str], required: Mapping[str, str], *, where: object) -> None:
    """Check that the columns exist.

    Args:
        present: columns of a split.
        required: config key -> column name.
        where: the file or dataset, for messages.

    Raises:
        UserError: naming the key, the missing column and the nearest one that exists.
    """
    for key, name in required.items():
        if name in present:
            continue
        near = difflib.get_close_matches(name, present, 1, 0.6)
        hint = f"did you mean {near[0]!r}? It" if near else "It"
        unlike = len(present) == 1 and any(sign in present[0] for sign in "\t,;|")
        check = "; the separator of csv is a comma, of tsv a tab" if unlike else ""
        raise UserError(f"{key}={name!r}: no such column in {where}; {hint} has: {', '.join(present)}{check}")


def check_names(names: Sequence[str], *, where: object) -> None:
    """Check that a file has columns, and that Arrow can hold their names.

    Raises:
        UserError: naming the column.
    """
    if not names:
        raise UserError(f"{where}: has no columns; give a file with a column for each key of task")
    bad = not_text(names)
    if bad is not None:
        raise UserError(f"{where}: the name of column {bad!r} is not valid text; rename it")
    cut = next((name for name in names if "\0" in name), None)  # where Arrow ends it, and two names may be one
    if cut is not None:
        raise UserError(f"{where}: the name of column {cut!r} holds a NUL character; rename it")


def not_text(cells: Sequence[str | None]) -> str | None:
    """The first cell that cannot be written as UTF-8."""
    for cell in cells:
        try:
            (cell or "").encode()
        except UnicodeEncodeError:
            return cell
    return None


def no_plain_cells(key: str, name: str, kind: object, *, where: object) -> UserError:
    """What is said of a column whose cells are no texts, numbers or truth values."""
    if key in STRUCTURED_KEYS:
        return UserError(f"{where}: column {name!r} holds {kind} values; it must hold a list in every row ({key})")
    if key == ID_KEY:
        return UserError(f"{key}={name!r}: {where} holds {kind} values; ids must be plain, or unset to use row numbers")
    return UserError(
        f"{where}: column {name!r} holds {kind} values; it must hold text or a number in every row ({key})"
    )
