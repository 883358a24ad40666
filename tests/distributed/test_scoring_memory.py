"""Ranks of a sharded model halve their batches together when one runs out of memory, wherever it is; none hangs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.launch import launch
from tests.distributed.scoring_memory import PLACES
from tests.runs import run_tree, write_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).with_name("scoring_memory.py")


#: Engine, batch size, and where memory runs out.
CASES = [
    ("zero3-2", "auto", PLACES),
    ("fsdp2-2", 8, ("in the forward pass", "after the forward pass", "backward", "in the second pass")),
]


@pytest.mark.parametrize(("engine", "batch_size", "places"), CASES)
def test_ranks_halve_together(
    engine: str, batch_size: Any, places: tuple[str, ...], tmp_path: Path, models_dir: Path
) -> None:
    tree = run_tree("llama", tmp_path, models_dir, "memory", allocation={"policy": "fixed"})
    tree["scoring"] |= {
        "batch_size": batch_size,
        "delta_loss": "exact",  # which makes all passes
        "shard_size": 18,
        "max_length": 12,
        "warmup_steps": 12,
        "refresh": "none",
        "eta": 1.0,
    }
    tree["train"] |= {"lr": 1e-9, "micro_batch_size": 2}  # the weights stay as they are
    tree["task"]["dataset"]["max_train_samples"] = 24
    config = write_config(tmp_path / "config.yaml", tree)
    launch(engine, SCRIPT, [str(config), str(tmp_path / "out.json"), *places], tmp_path, timeout=200)
    outcome = json.loads((tmp_path / "out.json").read_text())
    assert outcome["engine"] == engine.split("-")[0]
    expected = outcome["passes"].pop("None")
    assert expected["raised"] == [0, 0]
    assert tuple(outcome["passes"]) == places
    for place, found in outcome["passes"].items():
        assert found["raised"][0] == 0, place
        assert found["raised"][1] >= 1, f"{place}: rank 1 never ran out of memory"
        assert found["fits"] in ([1, 1], [2, 2]), place
        assert not found["one_at_a_time"], place
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-4, err_msg=place)
        np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-3, err_msg=place)
