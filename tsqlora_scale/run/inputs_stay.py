"""What a run reads is not in the folder that it empties when it starts."""

from __future__ import annotations

import os
from pathlib import Path

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.dataset_section import DatasetConfig, listed
from tsqlora_scale.config.locations import resolve
from tsqlora_scale.config.schema import Config
from tsqlora_scale.report.record import CONTENTS


def _folder_of(dataset: DatasetConfig) -> Path:
    return Path() if dataset.path is None else Path(resolve(dataset.path, key="task.dataset.path"))


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
        *(("task.dataset.exclude", each.exclude) for each in config.task.datasets),
        *(
            (f"task.dataset.{key}", str(_folder_of(each) / file))
            for each in config.task.datasets
            for key, file in each.files
        ),
        *(("task.query", str(_folder_of(config.task.dataset) / file)) for file in listed(config.task.query)),
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
