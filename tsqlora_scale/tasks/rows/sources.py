"""Where the rows come from: a hub dataset or local files. Either way a memory-mapped :class:`datasets.Dataset`.

Local files are converted once into an Arrow cache (``HF_DATASETS_CACHE``), under a file lock: the ranks of a node
share the pages of one copy, and a pool may be larger than memory. The cache key holds the file's size and time.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow as pa

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import DatasetConfig
from tsqlora_scale.tasks.rows.data_files import find_files
from tsqlora_scale.tasks.rows.origin import Origin
from tsqlora_scale.tasks.rows.parquet_files import class_names
from tsqlora_scale.tasks.rows.readers import file_format, read_tables
from tsqlora_scale.tasks.rows.wanted import Wanted

SplitName = str
E = TypeVar("E", bound=BaseException)

#: Part of every cache key; raise it when :mod:`tsqlora_scale.tasks.rows.readers` reads a file differently.
_READERS_VERSION = "6"


@dataclass(frozen=True)
class Opened:
    """The raw rows of a split.

    Attributes:
        rows: memory-mapped; of local files the wanted columns as texts, of a hub dataset as they are there.
        where: the words that messages name them by.
        classes: the classes that the numbers of the label column stand for, where the data says so.
    """

    rows: datasets.Dataset
    where: Origin
    classes: list[str] | None


def open_pool(cfg: DatasetConfig, wanted: Wanted, *, label: str | None) -> Opened:
    """The training split.

    Args:
        wanted: the columns to read.
        label: the column whose classes are asked for.

    Raises:
        UserError: missing or malformed file, unreachable hub dataset, no such column, or no rows.
    """
    if cfg.name is not None:
        return _from_hub(cfg, cfg.train_split, "train_split", wanted, label)
    assert cfg.train_file is not None, "the config requires one"
    return _from_files(cfg, cfg.train_file, "train_file", wanted, label)


def open_dev(cfg: DatasetConfig, name: str, wanted: Wanted, *, label: str | None) -> Opened:
    """The held-out set called ``name`` in ``cfg.dev_sets``, as :func:`open_pool` opens the pool.

    Raises:
        UserError: see there.
    """
    key = f".{name}" if name and not isinstance(cfg.dev_split, list) else ""
    place = cfg.dev_sets[name]
    if cfg.name is not None:
        assert isinstance(place, str)
        return _from_hub(cfg, place, f"dev_split{key}", wanted, label)
    return _from_files(cfg, place, f"dev_file{key}", wanted, label)


def open_query(cfg: DatasetConfig, value: str | list[str], wanted: Wanted, *, label: str | None) -> Opened:
    """The files of ``task.query``, as :func:`open_pool` opens the pool's.

    Raises:
        UserError: see there.
    """
    return _from_paths(find_files(value, cfg.path, key="task.query"), cfg, wanted, label)


def _from_hub(cfg: DatasetConfig, split: str, key: str, wanted: Wanted, label: str | None) -> Opened:
    where = f"dataset {cfg.name}{f'/{cfg.subset}' if cfg.subset else ''}, split {split!r}"
    try:
        with _quiet():
            dataset = datasets.load_dataset(cfg.name, cfg.subset, split=split)
    except Exception as error:  # the hub, the network and every dataset script have exceptions of their own
        files = _parquet_files(cfg, split) if isinstance(error, ValueError) and "dtype equivalent" in str(error) else []
        if files:  # some column is of a type that `datasets` cannot hold; of these files we read what is wanted
            return _from_paths(files, cfg, wanted, label)
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"task.dataset.name={cfg.name!r}: cannot load {where}: {reason}; check name, subset, "
            f"{key} and the network, or use local files (task.dataset.path)"
        ) from None
    assert isinstance(dataset, datasets.Dataset)
    if not len(dataset):
        raise UserError(f"{where}: no rows; it needs at least one")
    names = wanted.among(dataset.column_names, where=where)
    if not wanted.others:
        dataset = dataset.select_columns(names)
    feature = dataset.features.get(label)
    classes = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return Opened(dataset, Origin(where), classes)


def _from_files(cfg: DatasetConfig, value: str | list[str], key: str, wanted: Wanted, label: str | None) -> Opened:
    """One file, or several whose rows follow one another; each is converted, and found in the cache, by itself."""
    return _from_paths(find_files(value, cfg.path, key=f"task.dataset.{key}"), cfg, wanted, label)


def _parquet_files(cfg: DatasetConfig, split: str) -> list[Path]:
    """The files of a split of a hub dataset that is written as parquet, on this machine; none of any other."""
    try:
        builder = datasets.load_dataset_builder(cfg.name, cfg.subset)
        named = (builder.config.data_files or {}).get(split, [])
        with _quiet():
            found = [Path(path) for path in datasets.DownloadManager().download(list(named))]
    except Exception:  # what has gone wrong is said by the error that led here
        return []
    return found if all(path.suffix == ".parquet" for path in found) else []


def _from_paths(paths: list[Path], cfg: DatasetConfig, wanted: Wanted, label: str | None) -> Opened:
    with _quiet():
        parts = [_from_file(path, cfg, wanted) for path in paths]
    classes = [class_names(p, label) if label and file_format(p) == "parquet" else None for p in paths]
    if len(parts) == 1:
        return Opened(parts[0], Origin(str(paths[0])), classes[0])
    _check_shards(paths, parts, classes)
    where = f"{paths[0]} and {len(paths) - 1} more"
    ends = tuple(np.cumsum([len(part) for part in parts]).tolist())
    rows = datasets.concatenate_datasets([part.select_columns(parts[0].column_names) for part in parts])
    return Opened(rows, Origin(where, tuple(map(str, paths)), ends), classes[0])


def _check_shards(
    paths: Sequence[Path], parts: Sequence[datasets.Dataset], classes: Sequence[list[str] | None]
) -> None:
    """The shards of one split have the same columns, and number their classes alike.

    Raises:
        UserError: naming the first that differs.
    """
    first = parts[0].features
    for path, part, names in zip(paths, parts, classes, strict=True):
        different = [name for name in {**first, **part.features} if first.get(name) != part.features.get(name)]
        if different:
            kind, other = (str(f.get(different[0], "no such column")) for f in (part.features, first))
            raise UserError(
                f"{path}: column {different[0]!r} is of another kind ({kind}) than in {paths[0]} ({other}); "
                "the files of a split need the same columns"
            )
        if names != classes[0]:
            raise UserError(
                f"{path}: its label numbers stand for {names or 'no classes by name'}, those of {paths[0]} for "
                f"{classes[0] or 'none'}; write the files of a split alike"
            )


def _from_file(path: Path, cfg: DatasetConfig, wanted: Wanted) -> datasets.Dataset:
    stat = path.stat()
    read = sorted(wanted.keys().items()), wanted.others, cfg.column_names, cfg.quoting
    key = repr((_READERS_VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns, read))
    try:
        builder = _LocalFile(path, cfg, wanted, hash=hashlib.sha256(key.encode()).hexdigest())
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

    def __init__(self, path: Path, cfg: DatasetConfig, wanted: Wanted, *, hash: str) -> None:
        self._path, self._cfg, self._wanted = path, cfg, wanted
        super().__init__(dataset_name="tsqlora_local", hash=hash)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train")]

    def _generate_tables(self) -> Iterator[tuple[int, pa.Table]]:
        cfg = self._cfg
        yield from enumerate(read_tables(self._path, self._wanted, column_names=cfg.column_names, quoting=cfg.quoting))


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
