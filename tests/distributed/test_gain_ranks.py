"""Ranks by what they are worth: the same on any engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import WORKER, launch
from tests.runs import losses_of, ranks_of, result_of, run_tree, write_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_the_same_ranks_on_every_engine(tmp_path: Path, models_dir: Path) -> None:
    """Of a dense base and of a 4-bit one, in one launch an engine."""
    folders: dict[str, list[Path]] = {}
    for engine in ("plain", "ddp-2", "zero3-2"):
        configs = []
        for base in ("none", "nf4"):
            tree = run_tree(
                "llama", tmp_path / engine, models_dir, base, model={"quantization": base},
                allocation={"policy": "gain", "budget": "auto", "tolerance": 0.3}, sampling={"selector": "full"},
            )  # fmt: skip
            configs.append(str(write_config(tmp_path / f"{engine}-{base}.yaml", tree)))
        launch(engine, WORKER, configs, tmp_path)
        folders[engine] = [tmp_path / engine / "runs" / base for base in ("none", "nf4")]
    for engine in ("ddp-2", "zero3-2"):
        for expected, found in zip(folders["plain"], folders[engine], strict=True):
            assert result_of(found)["engine"] == engine.split("-")[0]
            assert ranks_of(found) == ranks_of(expected)
            assert len(losses_of(found)) == 13
            assert losses_of(found) == pytest.approx(losses_of(expected), abs=1e-5)
