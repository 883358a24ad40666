"""A file is what it was or what it shall be, and nothing is left beside it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tsqlora_scale.common import files
from tsqlora_scale.common.files import written_whole


def test_a_file_appears_at_the_end_and_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    flushed: list[str] = []
    fsync = files.fsync

    def spy(partial: Path) -> None:
        assert path.read_text() == "old"
        flushed.append(partial.read_text())
        fsync(partial)

    monkeypatch.setattr(files, "fsync", spy)
    with written_whole(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert flushed == ["new"]
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("where", ["the write", "os.fsync", "Path.replace"])
def test_an_error_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.json"
    path.write_text("old")
    if where == "os.fsync":
        monkeypatch.setattr(os, "fsync", full)
    elif where == "Path.replace":
        monkeypatch.setattr(Path, "replace", full)

    def write() -> None:
        with written_whole(path) as partial:
            partial.write_text("new")
            if where == "the write":
                full()

    with pytest.raises(OSError, match="No space left"):
        write()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
