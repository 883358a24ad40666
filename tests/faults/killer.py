"""Kill a training process with SIGKILL at the n-th crossing of a named point.

Points lie around functions of the package and of the libraries that write for it; nothing in the package knows of them.
``X: before`` and ``X: after`` are crossed around a call, ``X: within`` where half of what it writes is written.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import safetensors.torch
import transformers

from tsqlora_scale import training as train
from tsqlora_scale.engine.engine import Engine
from tsqlora_scale.quality import ScoreTable
from tsqlora_scale.quality.scores.measurer import Measurer
from tsqlora_scale.quality.scores.score_parts import Parts
from tsqlora_scale.report.record import RunRecord
from tsqlora_scale.run import build, checkpoint
from tsqlora_scale.run import training_run as run
from tsqlora_scale.run.training_run import Run

#: A point and which of its crossings, from 1.
Crossing = tuple[str, int]


class Killer:
    """Counts crossings, and dies in one of them.

    Args:
        target: where to die; none: nowhere.
        folder: calls that take a path are points only below it.
    """

    def __init__(self, target: Crossing | None, folder: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._target = target
        self._folder = str(folder)

    def cross(self, point: str, on_target: Callable[[], None] | None = None) -> None:
        """Count; on the target, do the last thing and die."""
        self.counts[point] += 1
        if (point, self.counts[point]) == self._target:
            if on_target is not None:
                on_target()
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Put the points in place, for good: this process ends with the run."""
        points = {
            Run: "draw evaluate save_checkpoint score _use_scores save_adapter load_state_dict",
            Engine: "backward _prepare _take_down gather",
            RunRecord: "prepare rewind result",
            Parts: "append discard",
            ScoreTable: "write",
            Measurer: "_chunk",
            train: "optimizer_step resize_model",
            run: "prune",
            build: "drop_after read_checkpoint",
            transformers.PreTrainedTokenizerBase: "save_pretrained",
            checkpoint: "_sha256 fsync",
        }
        for owner, names in points.items():
            for name in names.split():
                self._wrap(owner, name)
        self._wrap(checkpoint, "save_file", half_saved)
        self._wrap(RunRecord, "_append", half_appended)
        self._wrap(pq, "write_table", half_table)
        self._wrap(peft.PeftModel, "save_pretrained", half_adapter)
        self._wrap(Path, "write_text", half_text, below=True)
        self._wrap(Path, "rename", below=True)
        self._wrap(Path, "replace", below=True)
        self._wrap(shutil, "rmtree", half_removed, below=True)

    def _wrap(self, owner: Any, name: str, half: Callable[..., None] | None = None, *, below: bool = False) -> None:
        original = getattr(owner, name)
        point = f"{owner.__name__.split('.')[-1]}.{name}"

        def wrapper(*args: Any, **options: Any) -> Any:
            if below and not str(args[0]).startswith(self._folder):
                return original(*args, **options)
            self.cross(f"{point}: before")
            if half is not None:
                self.cross(f"{point}: within", lambda: half(original, *args, **options))
            result = original(*args, **options)
            self.cross(f"{point}: after")
            return result

        setattr(owner, name, wrapper)


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def half_saved(original: Callable[..., Any], tensors: Any, path: Path) -> None:
    """A tensor file cut short."""
    original(tensors, path)
    cut(path)


def half_appended(_: Callable[..., Any], record: RunRecord, name: str, line: dict[str, Any]) -> None:
    """A line cut short."""
    text = json.dumps(line)
    with (record.folder / name).open("a") as file:
        file.write(text[: len(text) // 2])


def half_table(original: Callable[..., Any], table: Any, where: Any, **options: Any) -> None:
    """A parquet file cut short."""
    whole = io.BytesIO()
    original(table, whole, **options)
    content = whole.getvalue()[: whole.tell() // 2]
    if isinstance(where, str | Path):
        Path(where).write_bytes(content)
    else:
        where.write(content)
        where.flush()


def half_adapter(original: Callable[..., Any], model: Any, folder: str, **options: Any) -> None:
    """An adapter whose weights are cut short."""
    original(model, folder, **options)
    cut(Path(folder) / "adapter_model.safetensors")


def half_text(original: Callable[..., Any], path: Path, text: str, *args: Any, **options: Any) -> None:
    """A text cut short."""
    original(path, text[: len(text) // 2], *args, **options)


def half_removed(_: Callable[..., Any], folder: Path, **options: Any) -> None:
    """A folder without its first file."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            path.unlink()
            return


assert safetensors.torch.save_file is checkpoint.save_file
