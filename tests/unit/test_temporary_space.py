"""Room for the temporary files of a large pool."""

from __future__ import annotations

import gc
import logging
import mmap
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.runs import run_tree
from tsqlora_scale.common import disk_arrays
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.config.schema import Config
from tsqlora_scale.run import preflight, temporary_space
from tsqlora_scale.run.build import build_run
from tsqlora_scale.training import train_to_the_end


def config_of(tmp_path: Path, models_dir: Path, **sections: dict[str, Any]) -> Config:
    return parse_config(run_tree("bert", tmp_path, models_dir, "run", **sections))


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A disk with room for 30 GB more."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 0, 30 * 10**9))
    return tmp_path


class Mapped(mmap.mmap):
    """Counts the bytes of those that there are."""

    now = most = 0

    def __init__(self, *_: object) -> None:
        Mapped.now += len(self)
        Mapped.most = max(Mapped.most, Mapped.now)

    def __del__(self) -> None:
        Mapped.now -= len(self)


@pytest.mark.parametrize(
    ("sampling", "scoring"),
    [
        ({}, {}),
        ({"replacement": False, "keep_fraction": 1.0, "unbiased": True}, {"delta_loss": "first_order"}),
        ({"unbiased": True, "keep_fraction": 1.0}, {"refresh": "none"}),
        ({"use": "weight", "keep_fraction": 1.0}, {}),
        ({"use": "weight", "keep_fraction": 1.0}, {"refresh": "none"}),
        ({"use": "weight", "keep_fraction": 1.0}, {"refresh": "none", "max_samples": 30}),
        ({"keep_fraction": 1.0}, {"refresh": "none"}),
        ({"redundancy": 1.0, "keep_fraction": 0.25}, {"refresh": "none"}),
    ],
)
def test_what_is_asked_for_is_what_a_run_takes(
    sampling: dict[str, Any], scoring: dict[str, Any], tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = {"start": 4, "end": 4, "every": 4}
    config = config_of(
        tmp_path, models_dir, sampling=sampling, scoring=scoring, train={"max_steps": 5}, schedule=schedule
    )
    checked = preflight.check(config)
    monkeypatch.setattr(disk_arrays, "IN_MEMORY", 0)
    monkeypatch.setattr(disk_arrays.mmap, "mmap", Mapped)
    monkeypatch.setattr(Mapped, "now", 0)
    monkeypatch.setattr(Mapped, "most", 0)
    gc.disable()
    try:
        train_to_the_end(build_run(checked))
    finally:
        gc.enable()
    taken = Mapped.most / checked.plan.pool_size
    assert 0.93 * temporary_space.score_bytes(config, 48) <= taken <= temporary_space.score_bytes(config, 48)


def test_of_every_rank_here(disk: Path, tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, models_dir)
    each = temporary_space.score_bytes(config, 10**8) / 10
    assert 15 < each < 20
    temporary_space.check_space(config, 10**8)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    temporary_space.check_space(config, 10**8)  # the other three may be elsewhere
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    needed = rf"{2 * each + 2.1:.3g} GB on the 2 ranks"
    with pytest.raises(UserError, match=rf"TMPDIR='{disk}': has 30 GB of room.*100000000 samples take {needed}"):
        temporary_space.check_space(config, 10**8)
    temporary_space.check_space(config, 10**7)
    temporary_space.check_space(
        config_of(tmp_path, models_dir, sampling={"selector": "full"}, scoring={"enabled": False}), 10**9
    )


def test_a_pool_that_is_small_for_a_rank_may_be_large_for_a_machine(
    disk: Path, tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, models_dir)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 0, 10**9))
    temporary_space.check_space(config, 5 * 10**6)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="on the 8 ranks here"):
        temporary_space.check_space(config, 5 * 10**6)


def test_no_folder_for_temporary_files(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, models_dir)

    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    temporary_space.check_space(config, 1000)
    with pytest.raises(UserError, match="TMPDIR: No usable temporary directory"):
        temporary_space.check_space(config, 10**8)


def test_files_that_lie_in_memory(
    disk: Path, tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "tsqlora_scale")
    config = config_of(tmp_path, models_dir)
    mounts = tmp_path / "mounts"
    inside = f"{tmp_path}".replace(" ", "\\040")
    mounts.write_text(f"disk / ext4 rw 0 0\ntmpfs {inside} tmpfs rw 0 0\ndisk {inside}x ext4 rw 0 0\n")
    assert temporary_space.file_system(str(tmp_path / "a"), mounts) == "tmpfs"
    assert temporary_space.file_system(str(tmp_path.parent), mounts) == "ext4"
    assert temporary_space.file_system(str(tmp_path), tmp_path / "none") is None
    assert temporary_space.file_system("/proc") in ("proc", None)
    for kind, lines in (("ext4", 0), (None, 0), ("tmpfs", 1)):
        monkeypatch.setattr(temporary_space, "file_system", lambda folder, kind=kind: kind)
        temporary_space.check_space(config, 10**7)
        assert len(caplog.messages) == lines
    assert caplog.messages == [
        f"TMPDIR='{tmp_path}' lies in memory (tmpfs), and so will the scores of the pool; "
        "set TMPDIR to a folder on a disk"
    ]
    temporary_space.check_space(config, 10**5)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    temporary_space.check_space(config, 10**7)
    assert len(caplog.messages) == 1, "small pools, and other ranks"
