"""Where the rows come from: a hub dataset or local files. Either way a memory-mapped :class:`datasets.Dataset`.

Local files are converted once into an Arrow cache (``HF_DATASETS_CACHE``), under a file lock: the ranks of a node
share the pages of one copy, and a pool may be larger than memory. The cache key holds the file's size and time.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import datasets
import pyarrow as pa

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config import locations
from tsqlora_scale.config.schema import DatasetConfig
from tsqlora_scale.tasks.rows.readers import read_tables

SplitName = Literal["train", "dev"]
E = TypeVar("E", bound=BaseException)

#: Part of every cache key; raise it when :mod:`tsqlora_scale.tasks.rows.readers` reads a file differently.
_READERS_VERSION = "3"


def open_split(
    cfg: DatasetConfig, split: SplitName, *, text_columns: Sequence[str]
) -> tuple[datasets.Dataset, str] | None:
    """The raw rows of a split and the words that messages name it by; None for a dev split that is not configured.

    Raises:
        UserError: missing or malformed file, unreachable hub dataset, or no rows.
    """
    with _quiet():
        if cfg.name is not None:
            if split == "dev" and cfg.dev_split is None:
                return None
            opened = _from_hub(cfg, split)
        else:
            file = cfg.train_file if split == "train" else cfg.dev_file
            if file is None:
                return None
            path = _find(cfg, file, split)
            opened = _from_file(path, cfg.column_names, text_columns), str(path)
    dataset, where = opened
    if not len(dataset):
        raise UserError(f"{where}: no rows; it needs at least one")
    return dataset, where


def _from_hub(cfg: DatasetConfig, split: SplitName) -> tuple[datasets.Dataset, str]:
    name = cfg.train_split if split == "train" else cfg.dev_split
    where = f"dataset {cfg.name}{f'/{cfg.subset}' if cfg.subset else ''}, split {name!r}"
    try:
        dataset = datasets.load_dataset(cfg.name, cfg.subset, split=name)
    except Exception as error:  # the hub, the network and every dataset script have exceptions of their own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"task.dataset.name={cfg.name!r}: cannot load {where}: {reason}; check name, subset, "
            f"{split}_split and the network, or use local files (task.dataset.path)"
        ) from None
    assert isinstance(dataset, datasets.Dataset)
    return dataset, where


def _find(cfg: DatasetConfig, file: str, split: SplitName) -> Path:
    assert cfg.path is not None
    folder = Path(locations.resolve(cfg.path, key="task.dataset.path"))
    path = folder / file
    if path.is_file():
        return path
    if not folder.is_dir():
        raise UserError(f"task.dataset.path={cfg.path!r}: no such folder; give the folder that holds the data files")
    if os.path.lexists(path):
        what = "a folder" if path.is_dir() else "no regular file"
        raise UserError(f"task.dataset.{split}_file={file!r}: is {what} in {folder}; give a file of that folder")
    near = difflib.get_close_matches(file, [p.name for p in folder.iterdir()], 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else "give a file of that folder"
    raise UserError(f"task.dataset.{split}_file={file!r}: no such file in {folder}; {hint}")


def _from_file(path: Path, column_names: Sequence[str] | None, text_columns: Sequence[str]) -> datasets.Dataset:
    stat = path.stat()
    key = repr((_READERS_VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns, column_names, text_columns))
    try:
        builder = _LocalFile(path, column_names, text_columns, hash=hashlib.sha256(key.encode()).hexdigest())
        builder.download_and_prepare()
        dataset = builder.as_dataset(split="train")
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        mistake = _cause(error, UserError)
        if mistake is not None:
            raise mistake from None
        reason = _cause(error, OSError)
        if reason is None:
            raise
        raise UserError(
            f"{path}: cannot be converted into the cache {datasets.config.HF_DATASETS_CACHE} ({reason}); "
            "set HF_DATASETS_CACHE to a writable folder with free space"
        ) from None
    assert isinstance(dataset, datasets.Dataset)
    return dataset


def _cause(error: BaseException | None, kind: type[E]) -> E | None:
    """The first exception of ``kind`` among ``error`` and what led to it."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


class _LocalFile(datasets.ArrowBasedBuilder):
    """One local file, converted to Arrow by :func:`read_tables`, with the cache and the locks of ``datasets``."""

    def __init__(
        self, path: Path, column_names: Sequence[str] | None, text_columns: Sequence[str], *, hash: str
    ) -> None:
        self._path, self._column_names, self._text_columns = path, column_names, text_columns
        super().__init__(dataset_name="tsqlora_local", hash=hash)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train")]

    def _generate_tables(self) -> Iterator[tuple[int, pa.Table]]:
        tables = read_tables(self._path, column_names=self._column_names, text_columns=self._text_columns)
        yield from enumerate(tables)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of ``datasets`` inside; as it was afterwards."""
    shown = not datasets.are_progress_bars_disabled()
    if shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
