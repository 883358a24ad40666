"""What a run reads is not in the folder that it empties when it starts."""

from __future__ import annotations

import os
from pathlib import Path

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.dataset_section import DatasetConfig
from tsqlora_scale.config.locations import resolve
from tsqlora_scale.config.schema import Config
from tsqlora_scale.report.record import CONTENTS


def _listed(files: str | list[str] | None) -> list[str]:
    return [files] if isinstance(files, str) else files or []


def _folder_of(dataset: DatasetConfig) -> Path:
    return Path() if dataset.path is None else Path(resolve(dataset.path, key="task.dataset.path"))


def _files_of(dataset: DatasetConfig) -> list[tuple[str, str]]:
    """Local files that a data set reads, with their keys."""
    found = [("exclude", dataset.exclude)] if dataset.exclude is not None else []
    if dataset.name is not None:
        return found
    folder = _folder_of(dataset)
    files = [("train_file", file) for file in _listed(dataset.train_file)]
    files += [("dev_file", file) for place in dataset.dev_sets.values() for file in _listed(place)]
    return found + [(key, str(folder / file)) for key, file in files]


def check_inputs_stay(config: Config, *more: tuple[str, str | None]) -> None:
    """What a run reads does not lie in what it is about to remove: a list of its own earlier audit, say.

    Args:
        more: other things that it reads, and how they are given.

    Raises:
        UserError: naming the key.
    """
    read: list[tuple[str, str | None]] = [
        ("adapter.init_from", config.adapter.init_from),
        ("allocation.file", config.allocation.file),
        ("sampling.file", config.sampling.file),
        *((f"task.dataset.{key}", file) for each in config.task.datasets for key, file in _files_of(each)),
        *(("task.query", str(_folder_of(config.task.dataset) / file)) for file in _listed(config.task.query)),
        *more,
    ]
    folder = config.run_dir.absolute()
    for key, value in read:
        path = None if value is None else Path(os.path.normpath(Path(value).absolute()))
        if path is not None and (path == folder or any(path.is_relative_to(folder / name) for name in CONTENTS)):
            raise UserError(
                f"{key}={value!r}: lies in the run folder {str(config.run_dir)!r}, which a run that starts there "
                "empties; choose another run.name, or copy it to another place"
            )
