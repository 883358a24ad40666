"""Columns that may be larger than memory."""

from __future__ import annotations

import contextlib
import gc
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tsqlora_scale.common import disk_arrays
from tsqlora_scale.common.errors import UserError


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """All columns are mapped to files in this folder."""
    monkeypatch.setattr(disk_arrays, "IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def mapped_files(folder: Path) -> int:
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("kind", [bool, np.int32, np.int64, np.float64])
def test_a_large_column_is_an_array_in_a_file_that_goes_with_it(kind, on_disk):
    column = disk_arrays.new_array(10_000, kind)
    assert type(column) is np.ndarray
    assert (column.shape, column.dtype) == ((10_000,), np.dtype(kind))
    assert column.flags.writeable
    column[:] = 1
    assert column.sum() == 10_000
    assert list(on_disk.iterdir()) == [], "it has no name"
    assert mapped_files(on_disk) == 1
    part = column[5:]
    del column
    assert part[0] == 1, "a part keeps the file"
    del part
    gc.collect()
    assert mapped_files(on_disk) == 0


def test_the_room_is_reserved(on_disk):
    """A file with holes would take the room when it is written to, and end the process where there is none."""
    column = disk_arrays.new_array(100_000, np.float64)
    held = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if str(on_disk) in str(link.readlink()):
                held.append(link.stat())
    assert [one.st_blocks * 512 >= column.nbytes for one in held] == [True]


def test_small_columns_stay_in_memory(on_disk, monkeypatch):
    monkeypatch.setattr(disk_arrays, "IN_MEMORY", 80)
    kept = disk_arrays.new_array(10, np.float64)
    assert mapped_files(on_disk) == 0
    other = disk_arrays.new_array(11, np.float64)
    assert mapped_files(on_disk) == 1
    assert len(disk_arrays.new_array(0, np.float64)) == 0
    del kept, other


def test_a_full_disk_is_said_at_once(on_disk):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    try:
        with pytest.raises(
            UserError,
            match=rf"TMPDIR='{on_disk}': 0\.008 GB more of the scores .*cannot be written there \(File too large\)",
        ):
            disk_arrays.new_array(10**6, np.float64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert mapped_files(on_disk) == 0


@settings(max_examples=60)
@given(
    arrays(bool, st.integers(0, 40)),
    arrays(np.int32, st.integers(0, 40), elements=st.integers(0, 5)),
    st.sampled_from([1, 3, 7, 100]),
    st.booleans(),
)
def test_in_blocks_as_in_one_piece(member, numbers, block, mapped):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_arrays, "BLOCK", block)
        if mapped:
            patch.setattr(disk_arrays, "IN_MEMORY", 0)
        values = np.random.default_rng(0).normal(size=len(member))
        assert disk_arrays.taken(values, member).tolist() == values[member].tolist()
        assert disk_arrays.taken(member, member).dtype == bool
        assert disk_arrays.positions(member).tolist() == np.flatnonzero(member).tolist()
        assert disk_arrays.counted(len(member)).tolist() == list(range(len(member)))
        assert disk_arrays.counts(numbers).tolist() == np.bincount(numbers).tolist()
        assert disk_arrays.filled(len(member), np.int64, -1).tolist() == [-1] * len(member)
        other = disk_arrays.copied(values)
        other[:] = 0
        assert len(other) == len(values)
        assert (values != 0).all()
        cut = list(disk_arrays.blocks(len(member)))
        assert [i for one in cut for i in range(one.start, one.stop)] == list(range(len(member)))
        assert all(one.stop - one.start <= block for one in cut)
