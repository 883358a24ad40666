"""Kill a training process with SIGKILL at the n-th crossing of a point in its code.

A point lies before or after a call of a function, or within it, where half of what it writes is written. It is named by
that function itself, of the package or of a library that writes for it; nothing in the package knows of points.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
from safetensors.torch import save_file

from tsqlora_scale.report.record import RunRecord

Function = Callable[..., Any]


@dataclass(frozen=True)
class Point:
    """A moment of a function's calls; calls that take a path count only below the folder of the run."""

    code: Function
    moment: str

    @property
    def name(self) -> str:
        """``module.qualified_name: moment``."""
        return f"{self.code.__module__.rsplit('.', 1)[-1]}.{self.code.__qualname__}: {self.moment}"


def before(code: Function) -> Point:
    """Just before each call."""
    return Point(code, "before")


def after(code: Function) -> Point:
    """Just after each call."""
    return Point(code, "after")


def within(code: Function) -> Point:
    """Where half of what a call writes is written: one of :data:`HALVES`."""
    assert code in HALVES, code
    return Point(code, "within")


class Killer:
    """Counts crossings, and dies in one of them.

    Args:
        points: all there are.
        target: name of the point to die in, and which of its crossings, from 1; none: nowhere.
        folder: calls that take a path are points only below it.
    """

    def __init__(self, points: Iterable[Point], target: tuple[str, int] | None, folder: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._points = set(points)
        assert len({point.name for point in self._points}) == len(self._points), "two points of one name"
        self._target = target
        self._folder = str(folder)

    def cross(self, point: Point, on_target: Callable[[], None] | None = None) -> None:
        """Count; on the target, do the last thing and die."""
        if point not in self._points:
            return
        self.counts[point.name] += 1
        if (point.name, self.counts[point.name]) == self._target:
            if on_target is not None:
                on_target()
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Put the points in place, for good: this process ends with the run."""
        for code in {point.code for point in self._points}:
            replace(code, self._wrapped(code))

    def _wrapped(self, code: Function) -> Function:
        half = HALVES.get(code)

        @wraps(code)
        def wrapper(*args: Any, **options: Any) -> Any:
            if code in OF_PATHS and not str(args[0]).startswith(self._folder):
                return code(*args, **options)
            self.cross(Point(code, "before"))
            if half is not None:
                self.cross(Point(code, "within"), lambda: half(code, *args, **options))
            result = code(*args, **options)
            self.cross(Point(code, "after"))
            return result

        return wrapper


def replace(code: Function, other: Function) -> None:
    """Put ``other`` in the place of a method in its class, or of a function under every name in every module."""
    *holder, name = code.__qualname__.split(".")
    if holder:
        owner = vars(sys.modules[code.__module__])[holder[0]]
        assert vars(owner)[name] is code, code
        setattr(owner, name, other)
        return
    for module in list(sys.modules.values()):
        for known_as, value in list(vars(module).items()):
            if value is code:
                setattr(module, known_as, other)


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def half_saved(original: Function, tensors: Any, path: str | Path, **options: Any) -> None:
    """A tensor file cut short; the libraries write such ones, too."""
    original(tensors, path, **options)
    cut(Path(path))


def half_appended(_: Function, record: RunRecord, name: str, line: dict[str, Any]) -> None:
    """A line cut short."""
    text = json.dumps(line)
    with (record.folder / name).open("a") as file:
        file.write(text[: len(text) // 2])


def half_table(original: Function, table: Any, where: Any, **options: Any) -> None:
    """A parquet file cut short."""
    whole = io.BytesIO()
    original(table, whole, **options)
    content = whole.getvalue()[: whole.tell() // 2]
    if isinstance(where, str | Path):
        Path(where).write_bytes(content)
    else:
        where.write(content)
        where.flush()


def half_adapter(original: Function, model: Any, folder: str, **options: Any) -> None:
    """An adapter whose weights are cut short."""
    original(model, folder, **options)
    cut(Path(folder) / "adapter_model.safetensors")


def half_text(original: Function, path: Path, text: str, *args: Any, **options: Any) -> None:
    """A text cut short."""
    original(path, text[: len(text) // 2], *args, **options)


def half_removed(_: Function, folder: Path, **options: Any) -> None:
    """A folder without its first file."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            path.unlink()
            return


HALVES: dict[Function, Callable[..., None]] = {
    save_file: half_saved,
    RunRecord._append: half_appended,
    pq.write_table: half_table,
    peft.PeftModel.save_pretrained: half_adapter,
    Path.write_text: half_text,
    shutil.rmtree: half_removed,
}
OF_PATHS = {Path.write_text, Path.rename, Path.replace, shutil.rmtree}
