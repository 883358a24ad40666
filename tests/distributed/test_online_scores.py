"""Scores from the steps under every engine: each rank ends with the same table, and it is that of one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.distributed.launch import WORKER, launch
from tests.runs import go, losses_of, ranks_of, result_of, run_tree, write_config
from tsqlora_scale.quality import ScoreTable

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

#: name -> model, its sections. Dropout, accumulation, weights of losses; rank events after steps 4 and 8.
CASES = {
    "bert": {"adapter": {"dropout": 0.1}, "sampling": {"unbiased": True}, "scoring": {"include_head": True}},
    "llama": {"model": {"gradient_checkpointing": True, "quantization": "nf4"}},
}


def tree(kind: str, folder: Path, models: Path) -> dict:
    found = run_tree(kind, folder, models, kind)
    found["scoring"] = {"source": "online", "sketch_dim": 64, "warmup_steps": 1}
    found["train"] |= {"max_steps": 9, "micro_batch_size": 2}  # the same passes on three ranks as on one
    for section, values in CASES[kind].items():
        found[section] = found.get(section, {}) | values
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Path:
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for kind in CASES:
        go(tree(kind, folder, models_dir))
    return folder / "runs"


@pytest.mark.parametrize("engine", ["ddp-2", "zero2-2", "zero3-3"])
def test_the_same_scores_on_every_engine(engine: str, alone: Path, tmp_path: Path, models_dir: Path) -> None:
    configs = [str(write_config(tmp_path / f"{kind}.yaml", tree(kind, tmp_path, models_dir))) for kind in CASES]
    launch(engine, WORKER, configs, tmp_path)
    for kind in CASES:
        run, reference = tmp_path / "runs" / kind, alone / kind
        assert result_of(run)["engine"] == engine.split("-")[0]
        assert losses_of(run) == pytest.approx(losses_of(reference), abs=1e-5)
        assert ranks_of(run) == ranks_of(reference)
        (found, _), (wanted, _) = (ScoreTable.read(folder / "scores") for folder in (run, reference))
        np.testing.assert_array_equal(found.selected, wanted.selected)
        np.testing.assert_array_equal(found.scoring_pass, wanted.scoring_pass)
        for name in ("loss", "grad_norm", "delta_loss", "convergence", "quality", "probability"):
            column = getattr(wanted, name)
            np.testing.assert_allclose(getattr(found, name), column, rtol=1e-3, atol=1e-4 * np.abs(column).max())
