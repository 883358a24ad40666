"""What makes steps faster changes no run where weights are sharded: order of length, batches made ahead, few logits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import launch
from tests.runs import go, losses_of, ranks_of, result_of, run_tree, write_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]


def test_the_trajectory(tmp_path: Path, models_dir: Path) -> None:
    engine = "zero3-2"
    sections = {"train": {"max_steps": 7}, "schedule": {"start": 4, "end": 4}}
    alone = go(run_tree("llama", tmp_path, models_dir, "alone", **sections)).record.folder
    tree = run_tree("llama", tmp_path, models_dir, "launched", **sections)
    config = write_config(tmp_path / "config.yaml", tree)
    launch(engine, Path(__file__).with_name("needed.py"), [str(config)], tmp_path)
    launched = tmp_path / "runs" / "launched"
    assert result_of(launched)["engine"] == engine.split("-")[0]
    assert losses_of(launched) == pytest.approx(losses_of(alone), abs=1e-4)
    assert ranks_of(launched) == ranks_of(alone)
