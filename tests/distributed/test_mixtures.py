"""A mixture is drawn alike on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.distributed.launch import ENGINES, WORKER, launch
from tests.mixed import mixed_tree
from tests.runs import losses_of, result_of, write_config
from tsqlora_scale.quality import ScoreTable

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]


def test_the_same_draws_on_two_ranks(tmp_path: Path, models_dir: Path) -> None:
    for engine in ("plain", "ddp-2"):
        tree = mixed_tree(tmp_path / engine, models_dir, "run", keep_fraction=0.5)
        tree["train"] |= {"max_steps": 6, "checkpoint_every": None, "eval_every": None}
        tree["schedule"] = {"start": 4, "end": 5, "every": 1}
        launch(engine, WORKER, [str(write_config(tmp_path / f"{engine}.yaml", tree))], tmp_path)
    alone, both = (tmp_path / engine / "runs" / "run" for engine in ("plain", "ddp-2"))
    assert result_of(both)["world_size"] == ENGINES["ddp-2"][0]
    assert result_of(both)["draws_by_set"] == result_of(alone)["draws_by_set"]
    assert sum(each["drawn"] for each in result_of(both)["draws_by_set"].values()) == 6 * 12
    assert losses_of(both) == pytest.approx(losses_of(alone), abs=1e-5)
    (ours, ids), (wanted, _) = (ScoreTable.read(folder / "scores") for folder in (both, alone))
    assert ids[36] == "few/0"
    np.testing.assert_array_equal(ours.selected, wanted.selected)
