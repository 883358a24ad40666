"""Samples end to end on several ranks: the run of one process that gives every sample a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import WORKER, launch
from tests.mixed_lengths import assert_same_run, mixed_tree
from tests.runs import go, result_of, write_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.mark.parametrize("engine", ["ddp-2"])
def test_the_same_run(engine: str, tmp_path: Path, models_dir: Path) -> None:
    """Two micro-batches a rank and step."""
    plain = go(mixed_tree("llama", tmp_path, models_dir, packing=False)).record.folder
    config = write_config(tmp_path / "config.yaml", mixed_tree("llama", tmp_path, models_dir, packing=True))
    launch(engine, WORKER, [str(config)], tmp_path)
    packed = tmp_path / "runs" / "packed"
    assert result_of(packed)["engine"] == engine.split("-")[0]
    assert_same_run(packed, plain)
