"""A checkpoint is complete or absent, whenever the process that writes or deletes it dies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tsqlora_scale.engine import checkpoint
from tsqlora_scale.engine.checkpoint import (
    checkpoint_dir,
    complete_checkpoints,
    drop_after,
    prune,
    read_checkpoint,
    write_checkpoint,
)
from tsqlora_scale.engine.state import ParamState, TrainState


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
    fsync = checkpoint._fsync

    def spy(path: Path) -> None:
        flushed[path.name] = path.stat().st_ino
        fsync(path)

    monkeypatch.setattr(checkpoint, "_fsync", spy)
    folder = tmp_path / "step-00000001"
    write(folder)
    assert folder.stat().st_ino == flushed["step-00000001.partial"]
    assert {path.name: path.stat().st_ino for path in folder.iterdir()}.items() <= flushed.items()
    assert list(flushed)[-1] == tmp_path.name, "the new name is flushed last"


def test_an_overwrite_that_dies_leaves_the_old_the_new_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "step-00000001", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", rmtree_dies)
        with pytest.raises(Killed):
            write(tmp_path / "step-00000001", 2.0)
    assert_all_readable(tmp_path)
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
