"""A checkpoint is complete or absent, whenever the process that writes or deletes it dies."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.engine.train_state import ParamState, TrainState
from tsqlora_scale.run import checkpoint
from tsqlora_scale.run.checkpoint import (
    checkpoint_dir,
    complete_checkpoints,
    drop_after,
    has_checkpoints,
    newest_checkpoint,
    prune,
    read_checkpoint,
    write_checkpoint,
)


class Killed(BaseException):
    """What no handler may catch."""


def write(folder: Path, value: float = 1.0) -> None:
    write_checkpoint(folder, TrainState({"w": ParamState.fresh(torch.full((4,), value))}, 1), {"value": value})


def rmtree_dies(folder: Path, ignore_errors: bool = False) -> None:
    """Delete one file, then die."""
    if folder.exists():
        next(p for p in sorted(folder.iterdir()) if p.name != checkpoint.MANIFEST).unlink()
        raise Killed


def assert_all_readable(root: Path) -> None:
    for folder in complete_checkpoints(root):
        read_checkpoint(folder)


def test_a_write_that_dies_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(path: Path) -> str:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sha256", dies)
        with pytest.raises(Killed):
            write(tmp_path / "step-00000001")
    assert complete_checkpoints(tmp_path) == []
    write(tmp_path / "step-00000001")
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_checkpoint_appears_at_once_and_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the folder that was flushed file by file, under another name; a copy could be cut short."""
    flushed: dict[str, int] = {}
    fsync = checkpoint.fsync

    def spy(path: Path) -> None:
        flushed[path.name] = path.stat().st_ino
        fsync(path)

    monkeypatch.setattr(checkpoint, "fsync", spy)
    folder = tmp_path / "step-00000001"
    write(folder)
    assert folder.stat().st_ino == flushed["step-00000001.partial"]
    assert {path.name: path.stat().st_ino for path in folder.iterdir()}.items() <= flushed.items()
    assert list(flushed)[-1] == tmp_path.name, "the new name is flushed last"


@pytest.mark.parametrize(("dies", "kept"), [("rmtree", 2.0), ("second rename", 1.0)])
def test_an_overwrite_that_dies_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: str, kept: float
) -> None:
    rename = Path.rename

    def dying(path: Path, target: Path) -> Path:
        if path.name == "step-00000001.partial":
            raise Killed
        return rename(path, target)

    write(tmp_path / "step-00000001", 1.0)
    with monkeypatch.context() as patch:
        if dies == "rmtree":
            patch.setattr(checkpoint.shutil, "rmtree", rmtree_dies)
        else:
            patch.setattr(Path, "rename", dying)
        with pytest.raises(Killed):
            write(tmp_path / "step-00000001", 2.0)
    assert_all_readable(tmp_path)
    assert has_checkpoints(tmp_path)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000001"
    assert read_checkpoint(tmp_path / "step-00000001")[1]["value"] == kept
    write(tmp_path / "step-00000001", 3.0)
    _, tree = read_checkpoint(tmp_path / "step-00000001")
    assert tree["value"] == 3.0


def test_pruning_that_dies_leaves_whole_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        write(tmp_path / f"step-{step:08d}")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", rmtree_dies)
        with pytest.raises(Killed):
            prune(tmp_path, keep=1, protect=set())
    assert_all_readable(tmp_path)
    prune(tmp_path, keep=1, protect=set())
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"], "remains of the dead are cleared"


def test_pruning_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in (5, 100, 20, 3, 1000):
        write(tmp_path / f"step-{step:08d}")
    prune(tmp_path, keep=2, protect={"step-00000005"})
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000005", "step-00000100", "step-00001000"]
    prune(tmp_path, keep=2, protect=set())
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000100", "step-00001000"]


def test_checkpoints_of_a_future_that_was_given_up_go(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        write(checkpoint_dir(tmp_path, step))
    drop_after(tmp_path, 8)
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["step-00000004", "step-00000008"]


def test_a_half_written_checkpoint_is_not_counted(tmp_path: Path) -> None:
    write(tmp_path / "step-00000001")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002.partial")
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000001"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_of_any_type_and_shape_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = torch.arange(12).reshape(3, 4).to(dtype)
    tensors = {"transposed": whole.T, "slice": whole[:, 1:3], "empty": whole[:0], "scalar": whole[1, 1]}
    write_checkpoint(tmp_path / "step-00000001", TrainState(), {"deep": {"deeper": tensors}, "nothing": {}})
    _, tree = read_checkpoint(tmp_path / "step-00000001")
    assert tree["nothing"] == {}
    for name, tensor in tensors.items():
        found = tree["deep"]["deeper"][name]
        assert found.dtype == dtype
        assert torch.equal(found, tensor)


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] ^= 1
    path.write_bytes(content)


NAMES = sorted(checkpoint.FILES)
OLDEST = "step-00000001"
DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    **{f"{n}, flipped at {at}": (n, lambda f, n=n, at=at: flip(f / n, at)) for n in NAMES for at in (0, 0.5, 1)},
    **{f"{name}, missing": (name, lambda f, n=name: (f / n).unlink()) for name in NAMES},
    **{f"{name}, cut": (name, lambda f, n=name: os.truncate(f / n, (f / n).stat().st_size - 1)) for name in NAMES},
    **{f"{name}, longer": (name, lambda f, n=name: (f / n).open("a").write(" ")) for name in NAMES},
    **{f"{name}, empty": (name, lambda f, n=name: os.truncate(f / n, 0)) for name in NAMES},
    "no manifest": ("manifest.json", lambda f: (f / "manifest.json").unlink()),
    "half a manifest": ("manifest.json", lambda f: os.truncate(f / "manifest.json", 20)),
    "no names": ("manifest.json", lambda f: (f / "manifest.json").write_text("{}")),
    "no dictionary": ("manifest.json", lambda f: (f / "manifest.json").write_text("[1]")),
    "another's manifest": ("parameters.safetensors", lambda f: shutil.copy(f.parent / OLDEST / "manifest.json", f)),
    "flipped manifest": ("parameters.safetensors", lambda f: flip(f / "manifest.json", 0.2)),
    "a file more": ("notes.txt", lambda f: (f / "notes.txt").write_text("")),
    "a file more in a folder": ("deep/notes.txt", lambda f: ((f / "deep").mkdir(), (f / "deep" / "notes.txt").touch())),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_taken(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        write(checkpoint_dir(tmp_path, step), float(step))
    named, damage = DAMAGE[kind]
    newest = checkpoint_dir(tmp_path, 3)
    damage(newest)
    with pytest.raises(
        UserError, match=re.escape(named) if named == "manifest.json" else re.escape(str(newest / named))
    ):
        read_checkpoint(newest)
    assert newest_checkpoint(tmp_path) == checkpoint_dir(tmp_path, 2)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert named in warning and str(newest) in warning
    assert warning.endswith("trying the one before it")
    for step in (1, 2):
        (checkpoint_dir(tmp_path, step) / "state.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* is undamaged .*--overwrite"):
        newest_checkpoint(tmp_path)


def test_hidden_files_of_a_file_system_do_not_matter(tmp_path: Path) -> None:
    write(tmp_path / "step-00000001")
    (tmp_path / "step-00000001" / ".nfs0001").touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000001"


@pytest.mark.parametrize("where", ["save_file", "_sha256", "fsync", "_replace"])
def test_what_cannot_be_written_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Of another step, and of the same step."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write(tmp_path / "step-00000001", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, where, full)
        for step in (1, 2):
            with pytest.raises(OSError, match="No space left"):
                write(checkpoint_dir(tmp_path, step), 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert read_checkpoint(tmp_path / "step-00000001")[1]["value"] == 1.0


def test_a_rename_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "step-00000001", 1.0)
    rename = Path.rename

    def full(path: Path, target: Path) -> Path:
        if path.name == "step-00000001.partial":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / "step-00000001", 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert read_checkpoint(tmp_path / "step-00000001")[1]["value"] == 1.0


@pytest.mark.parametrize("where", ["fsync of the parent", "rmtree of the old one"])
def test_what_is_complete_counts_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """Over one of the same step, whose remains are removed by the next pruning."""
    write(tmp_path / "step-00000001", 1.0)
    fsync, rmtree = checkpoint.fsync, shutil.rmtree

    def full_fsync(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        fsync(path)

    def full_rmtree(path: Path, ignore_errors: bool = False) -> None:
        if path.exists() and not ignore_errors:
            raise OSError(errno.EIO, "Input/output error")
        rmtree(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patch:
        if where == "fsync of the parent":
            patch.setattr(checkpoint, "fsync", full_fsync)
        else:
            patch.setattr(checkpoint.shutil, "rmtree", full_rmtree)
        write(tmp_path / "step-00000001", 2.0)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{tmp_path / 'step-00000001'} is written, but")
    assert read_checkpoint(tmp_path / "step-00000001")[1]["value"] == 2.0
    prune(tmp_path, keep=1, protect=set())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
