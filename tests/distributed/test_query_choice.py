"""A choice by a query is the same under every engine and on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.distributed.launch import ENGINES, WORKER, launch
from tests.queried import POOL, QUERY, queried
from tests.runs import losses_of, result_of, write_config
from tsqlora_scale.quality import ScoreTable

# the first test makes the runs of all engines
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(3000)]

CASES = ["bert", "bart"]
LAUNCHED = ["plain", "ddp-2", "zero2-2", "zero3-3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> dict[tuple[str, str], Path]:
    """Run folders by engine and base."""
    folder = tmp_path_factory.mktemp("queried")
    found = {}
    for engine in LAUNCHED:
        configs = []
        for kind in CASES:
            tree = queried(
                kind, folder / engine, models_dir, kind, sampling={"keep_fraction": 0.5},
                scoring={"shard_size": 20, "batch_size": 8}, train={"max_steps": 3, "micro_batch_size": 6},
            )  # fmt: skip
            configs.append(str(write_config(folder / f"{engine}-{kind}.yaml", tree)))
            found[engine, kind] = folder / engine / "runs" / kind
        less = queried(
            "bert", folder / engine, models_dir, "less",
            sampling={"selector": "less", "less": "max", "less_gradients": "adam", "keep_fraction": 0.5},
            scoring={"shard_size": 20, "batch_size": 8, "warmup_steps": 4},
            train={"max_steps": 6, "micro_batch_size": 6},
        )  # fmt: skip
        configs.append(str(write_config(folder / f"{engine}-less.yaml", less)))
        found[engine, "less"] = folder / engine / "runs" / "less"
        launch(engine, WORKER, configs, folder)
    return found


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("engine", LAUNCHED[1:])
def test_the_same_choice(runs: dict[tuple[str, str], Path], engine: str, kind: str) -> None:
    processes, stage, distributed_type = ENGINES[engine]
    result, reference = result_of(runs[engine, kind]), result_of(runs["plain", kind])
    assert result["world_size"] == processes
    assert result["distributed_type"] == distributed_type
    frozen = result["frozen_parameters"]
    assert frozen["sharded"] == (frozen["all"] if stage == 3 else 0)
    (ours, ids), (wanted, _) = (ScoreTable.read(runs[name, kind] / "scores") for name in (engine, "plain"))
    assert len(ids) == POOL + QUERY
    np.testing.assert_allclose(ours.quality, wanted.quality, atol=1e-4)
    np.testing.assert_array_equal(ours.selected, wanted.selected)
    assert ours.selected.sum() == result["subset_size"] == 24 + QUERY
    assert result["findings"]["evident"] == reference["findings"]["evident"]
    written = [set(pd.read_parquet(runs[name, kind] / "scores")) for name in (engine, "plain")]
    assert written[0] == written[1]
    assert ("log_wanted" in written[0]) == (kind == "bert"), "a second look, of classes"
    losses = losses_of(runs["plain", kind])
    assert len(losses) == 3
    assert losses_of(runs[engine, kind]) == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("engine", LAUNCHED[1:])
def test_the_same_gradients_through_the_same_optimizer(runs: dict[tuple[str, str], Path], engine: str) -> None:
    """``less`` as published needs Adam's moments, which ZeRO keeps in shards."""
    processes, _, distributed_type = ENGINES[engine]
    result = result_of(runs[engine, "less"])
    assert (result["world_size"], result["distributed_type"]) == (processes, distributed_type)
    (ours, _), (wanted, _) = (ScoreTable.read(runs[name, "less"] / "scores") for name in (engine, "plain"))
    spread = np.ptp(wanted.quality)
    assert spread > 0.05
    np.testing.assert_allclose(ours.quality, wanted.quality, atol=0.02 * spread)
