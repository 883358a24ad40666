"""A whole run whose pool counts as too large for memory: every column is mapped, and all is done in small blocks."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runs import go, losses_of, ranks_of, run_tree
from tsqlora_scale.common import disk_arrays
from tsqlora_scale.quality import ScoreTable
from tsqlora_scale.quality.draws import key_order
from tsqlora_scale.quality.scores.score_table import COLUMNS
from tsqlora_scale.quality.selectors.by_quality import QualitySelector
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.tasks import task

pytestmark = pytest.mark.slow


def is_mapped(column: np.ndarray) -> bool:
    while isinstance(column.base, np.ndarray):
        column = column.base
    return isinstance(column.base, mmap.mmap)


def test_it_is_the_same_run(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tree(name: str) -> dict[str, Any]:
        sections = {
            "sampling": {"unbiased": True, "keep_fraction": 0.75},
            "train": {"checkpoint_every": 6, "checkpoint_keep": 9},
        }
        return run_tree("bert", tmp_path, models_dir, name, **sections)

    small = go(tree("small"))
    monkeypatch.setattr(disk_arrays, "IN_MEMORY", 0)
    monkeypatch.setattr(disk_arrays, "BLOCK", 7)
    monkeypatch.setattr(key_order, "WINDOW", 5)
    monkeypatch.setattr(task, "ROWS", 7)
    large = go(tree("large"))
    resumed = go(tree("resumed"), resume=str(tmp_path / "runs" / "small" / "checkpoints" / "step-00000006"))
    small_table, small_weights = small.selector.table, small.selector.weights(np.arange(small.plan.pool_size))
    assert small_table is not None and small_weights is not None

    def agrees(run: Run, name: str, first: int) -> None:
        selector = run.selector
        assert isinstance(selector, QualitySelector) and selector.table is not None
        assert selector._importance is not None
        folder = tmp_path / "runs" / name
        assert losses_of(folder) == pytest.approx(losses_of(tmp_path / "runs" / "small")[first:], rel=1e-6)
        assert ranks_of(folder) == ranks_of(tmp_path / "runs" / "small")[-len(ranks_of(folder)) :]
        assert (run.seen == small.seen).all()
        assert (selector.table.selected == small_table.selected).all()
        assert (selector.table.scoring_pass == small_table.scoring_pass).all()
        np.testing.assert_allclose(selector.table.probability, small_table.probability, rtol=1e-4)
        np.testing.assert_allclose(selector._importance, small_weights, rtol=1e-4)
        held = {"seen": run.seen, "importance": selector._importance, "indices": selector._sampler.indices}
        held |= {"strata": selector.scorer.strata} | {name: getattr(selector.table, name) for name in COLUMNS}
        assert [name for name, column in held.items() if not is_mapped(column)] == []

    agrees(large, "large", 0)
    agrees(resumed, "resumed", 6)
    assert not is_mapped(small.seen)
    files = [ScoreTable.read(tmp_path / "runs" / name / "scores") for name in ("small", "large")]
    assert files[0][1] == files[1][1] == [str(i) for i in range(48)]
