"""A valid run in a folder of its own, to be damaged in one point, and what must then be seen from outside."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.runs import run_tree, write_config

#: The data folder, as seen from a place's own; a finished run elsewhere has the same config.
DATA = "data-classification"
SHORT: dict[str, dict[str, Any]] = {"sensitivity": {"enabled": False}, "train": {"max_steps": 9}}


@dataclass
class Place:
    """A folder with a config, data and a model that are right.

    Attributes:
        tree: the config; written when the case is made, unless the case has written the file itself.
        arguments: added to the command line.
        finished: the run folder of the config's run, done, and of its adapter; shared, to be copied.
    """

    folder: Path
    models: Path
    finished: Path
    tree: dict[str, Any] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tree = run_tree("bert", self.folder, self.models, "run", **SHORT)
        self.tree["task"]["dataset"]["path"] = DATA

    @property
    def config(self) -> Path:
        """The config file."""
        return self.folder / "config.yaml"

    @property
    def data(self) -> Path:
        """The data folder."""
        return self.folder / DATA

    @property
    def run_dir(self) -> Path:
        """The run folder; not there unless the case makes it."""
        return self.folder / "runs" / "run"

    def set(self, **sections: dict[str, Any]) -> None:
        """Change keys of sections."""
        for section, values in sections.items():
            self.tree[section] = self.tree.get(section, {}) | values

    def train_file(self, name: str, content: str | bytes, **task: Any) -> Path:
        """Put a training file of these contents in the place of the right one."""
        path = self.data / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        self.tree["task"] |= task
        self.tree["task"]["dataset"]["train_file"] = name
        return path

    def own_model(self) -> Path:
        """A copy of the model that may be damaged."""
        folder = self.folder / "model"
        shutil.copytree(self.tree["model"]["name_or_path"], folder)
        self.tree["model"]["name_or_path"] = str(folder)
        return folder

    def own_adapter(self, option: str = "--adapter") -> Path:
        """A copy of the adapter that may be damaged, named on the command line."""
        folder = self.folder / "adapter"
        shutil.copytree(self.finished / "adapter", folder)
        self.arguments += [option, str(folder)]
        return folder

    def command_line(self, command: str) -> list[str]:
        """The arguments of ``tsqlora``."""
        if not os.path.lexists(self.config):
            write_config(self.config, self.tree)
        config = ["--config", str(self.config)] if "--config" not in self.arguments else []
        return [command, *config, *self.arguments]


@dataclass(frozen=True)
class Case:
    """A malformed input.

    Attributes:
        name: of the test.
        words: what the message must hold, in any order: the key or ``file, row``, the value, the remedy.
        make: damages a place.
        command: that meets it.
        environment: variables beside the process's own, as a launcher sets them.
    """

    name: str
    words: tuple[str, ...]
    make: Callable[[Place], Any]
    command: str = "train"
    environment: dict[str, str] = field(default_factory=dict)


def settings(name: str, *words: str, command: str = "train", **sections: dict[str, Any]) -> Case:
    """Keys of the config changed."""
    return Case(name, words, lambda place: place.set(**sections), command)


def overrides(name: str, arguments: list[str], *words: str) -> Case:
    """Values on the command line."""
    return Case(name, words, lambda place: place.arguments.extend(arguments))


def config_file(name: str, content: str | bytes, *words: str) -> Case:
    """A config file of these contents."""
    data = content.encode() if isinstance(content, str) else content
    return Case(name, ("config.yaml", *words), lambda place: place.config.write_bytes(data))


def training_file(name: str, file: str, content: str | bytes, *words: str, **task: Any) -> Case:
    """A training file of these contents."""
    return Case(name, words, lambda place: place.train_file(file, content, **task))


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def listing(folder: Path) -> dict[str, str]:
    """Every path below a folder with a digest of what it is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            what = f"link to {os.readlink(path)}"  # noqa: PTH115 - as it is written
        elif path.is_file():
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            what = "folder"
        found[str(path.relative_to(folder))] = what
    return found


def assert_refused(returncode: int, out: str, err: str, words: tuple[str, ...]) -> None:
    """Exit code 2 and one line that says all."""
    assert returncode == 2, (returncode, out, err)
    assert "Traceback" not in err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert lines[0].isprintable()
    assert len(lines[0]) < 2500, "a line that nobody can read"
    assert out == ""
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"
