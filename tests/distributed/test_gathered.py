"""Under ZeRO-3, 4-bit weights that were gathered for a forward pass do not wait for the backward pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import launch
from tests.runs import run_tree, write_config
from tests.tiny import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).with_name("gathered.py")


def test_gathered_weights_do_not_wait(tmp_path: Path, models_dir: Path) -> None:
    model = {"name_or_path": str(tiny_model("llama", models_dir)), "quantization": "nf4"}
    config = write_config(tmp_path / "config.yaml", run_tree("llama", tmp_path, models_dir, "gathered", model=model))
    launch("zero3-2", SCRIPT, [str(config), str(tmp_path / "out.json")], tmp_path)
    outcome = json.loads((tmp_path / "out.json").read_text())
    assert outcome["engine"] == "zero3"
    assert outcome["whole"] > 0
    assert outcome["left"]
    assert max(outcome["left"]) < outcome["whole"] / 10
