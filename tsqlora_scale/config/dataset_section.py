"""Where a pool and its held-out sets lie, and which of their rows are read."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import model_validator

from tsqlora_scale.config.fields import PositiveInt, Section


def listed(files: str | list[str] | None) -> list[str]:
    """Files as they may be given: one, several, or none."""
    return [files] if isinstance(files, str) else files or []


class DatasetConfig(Section):
    """The pool and the held-out set: local files (``train_file``), or a hub dataset (``name``)."""

    #: A folder that the files below lie in, or ``package:NAME/sub/folder``; none: they are found from the current one.
    path: str | None = None
    #: A file, a pattern (``part-*.parquet``, in the order of the names), or a list of them, one after another.
    train_file: str | list[str] | None = None
    #: Likewise; or a mapping of names to them, for several held-out sets, of which the first decides what is best.
    dev_file: str | list[str] | dict[str, str | list[str]] | None = None
    #: A hub dataset.
    name: str | None = None
    #: A configuration of the hub dataset; none where it has one alone.
    subset: str | None = None
    #: The hub dataset's split that is the pool.
    train_split: str = "train"
    #: None where the hub dataset has no such split; a list or a mapping of names to splits for several.
    dev_split: str | list[str] | dict[str, str] | None = "validation"
    #: Column names of csv/tsv files that have no header row.
    column_names: list[str] | None = None
    #: What a quote means in csv and tsv files: ``none``, a character like any other; ``double``, it encloses fields
    #: and is doubled inside, as pandas writes; ``auto``, double in csv and none in tsv.
    quoting: Literal["auto", "none", "double"] = "auto"
    #: A column with unique sample ids; without it the id is the row's number in the pool.
    id_column: str | None = None
    #: A file of sample ids to leave out of the pool: one a line (txt), or a table's column ``sample_id`` or ``id``.
    exclude: str | None = None
    #: A column of the pool with numbers that multiply how often a row is drawn; 0 leaves it out.
    weight: str | None = None
    #: Leave out rows with an empty text, and conversations of which nothing can be learned, instead of refusing the
    #: data.
    drop_empty: bool = False
    #: A random subset of that size, fixed by ``run.seed``: files are often sorted.
    max_train_samples: PositiveInt | None = None
    #: Likewise, of every held-out set.
    max_dev_samples: PositiveInt | None = None
    #: One half of every held-out set, drawn once for all seeds: what is chosen on ``tuning`` is reported on ``report``.
    dev_half: Literal["tuning", "report"] | None = None

    @property
    def has_dev(self) -> bool:
        """Whether there is a held-out set."""
        return bool(self.dev_sets)

    @property
    def dev_sets(self) -> dict[str, str | list[str]]:
        """Files, or the split of a hub dataset, of every held-out set by its name, the deciding one first.

        One that has no name is called by the empty text.
        """
        if self.name is not None:
            if isinstance(self.dev_split, list):
                return {split: split for split in self.dev_split}
            places: Any = self.dev_split
        else:
            places = self.dev_file
        if isinstance(places, dict):
            return dict(places)
        return {} if places is None else {"": places}

    @property
    def files(self) -> list[tuple[str, str]]:
        """Local files of the pool and of the held-out sets, as they are given, each with its key."""
        if self.name is not None:
            return []
        places = [("train_file", self.train_file), *(("dev_file", place) for place in self.dev_sets.values())]
        return [(key, file) for key, place in places for file in listed(place)]

    @property
    def is_named(self) -> bool:
        """Whether it says where data is; one that says nothing but which half is meant stands beside a mixture."""
        return bool(self.model_dump(exclude={"dev_half"}, exclude_defaults=True))

    @model_validator(mode="after")
    def _one_source(self) -> DatasetConfig:
        if not self.is_named:
            return self
        if (self.path is not None or self.train_file is not None) == (self.name is not None):
            raise ValueError("needs exactly one of 'path' or 'train_file' (local files) and 'name' (a hub dataset)")
        if self.path is not None and self.train_file is None:
            raise ValueError("'path' needs 'train_file', the training file inside it")
        if self.name is not None and self.dev_file is not None:
            raise ValueError("'dev_file' is of local files, and 'name' of a hub dataset: set 'dev_split' instead")
        return self

    @model_validator(mode="after")
    def _names_of_sets(self) -> DatasetConfig:
        key = "dev_file" if self.name is None else "dev_split"
        places = [(self.train_file, "train_file"), *((place, key) for place in self.dev_sets.values())]
        for place, name in places:
            if place in ("", []) or (isinstance(place, list) and "" in place):
                raise ValueError(f"'{name}' names no file: give one, or leave it out")
        sets: Any = self.dev_file if self.name is None else self.dev_split
        if isinstance(sets, dict | list) and not sets:
            raise ValueError(f"'{key}' names nothing: give a held-out set, or null")
        for name in sets if isinstance(sets, dict) else ():
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"'{key}': {name!r} is no name of a held-out set: use letters, digits, '_', '-', '.'")
        return self
