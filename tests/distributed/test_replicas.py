"""Faults that other trainers have trained on with, and ours names: every engine, every place that is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import launch
from tests.runs import run_tree, write_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).with_name("injected.py")


@pytest.mark.parametrize("engine", ["ddp-2", "zero2-2", "zero3-2", "fsdp2-2"])
def test_what_one_rank_has_otherwise_is_named(engine: str, tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", scoring={"enabled": False}, sampling={"selector": "full"})
    config = write_config(tmp_path / "config.yaml", tree)
    launch(engine, SCRIPT, [str(config), str(tmp_path / "out.json")], tmp_path, timeout=250)
    first, second = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert first == second, "all ranks stop, for the same reason"
    assert first["engine"] == engine.split("-")[0]
    for place in ("whole", "healed", "detached"):
        assert first[place] == "nothing", place
    assert f"value of {first['names'][3]}" in first["value"]
    assert "query.lora_A.late.weight was made after the engine started" in first["attached"]
    assert "exp_avg of " in first["event"] and "ranks of layers have changed" in first["event"]
    for name in first["names"][:2]:
        assert f"exp_avg of {name}" in first["resume"]
    for place in ("value", "event", "resume"):
        assert "rank 1" in first[place] and "rank 0" not in first[place], place
    run_dir = tmp_path / "runs" / "run"
    assert len(list((run_dir / "checkpoints").glob("step-*"))) == 1, "those of whole ranks alone"
