"""A prompt's words are found alike, and learned alike, on sharded ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import WORKER, launch
from tests.prompted import prompted_tree
from tests.runs import go, losses_of, result_of, write_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]


def test_the_same_words_and_losses_under_zero3(tmp_path: Path, models_dir: Path) -> None:
    trees = {}
    for name in ("alone", "both"):
        tree = trees[name] = prompted_tree(
            "masked", tmp_path, models_dir, name, label_words="auto", demonstrations=1, max_length=48
        )
        tree["adapter"]["method"] = "tsqlora"
        tree["schedule"] = {"start": 3, "end": 4, "every": 1}
        tree["train"]["checkpoint_every"] = None
    alone = go(trees["alone"]).record.folder
    launch("zero3-2", WORKER, [str(write_config(tmp_path / "both.yaml", trees["both"]))], tmp_path)
    both = alone.with_name("both")
    assert result_of(both)["engine"] == "zero3"
    assert result_of(both)["prompt"] == result_of(alone)["prompt"]
    assert result_of(both)["metrics_before"] == result_of(alone)["metrics_before"]
    assert losses_of(both) == pytest.approx(losses_of(alone), abs=1e-5)
