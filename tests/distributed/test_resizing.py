"""Rank events that the method's own policy seldom makes, under every engine: layers removed and brought back,
grown where their gradients point."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, launch
from tests.runs import losses_of, ranks_of, result_of, run_tree, write_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

#: A worker whose runs use another policy.
SCRIPTED = """
import sys
sys.path.insert(0, {root!r})
from tests.distributed import worker
from tests.policies import RemoveAndRestore
from tsqlora_scale import run

run.TsqLoraPolicy = lambda config: RemoveAndRestore()
sys.exit(worker.main())
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> dict[str, Path]:
    """Run folders by engine."""
    folder = tmp_path_factory.mktemp("resizing")
    script = folder / "scripted.py"
    script.write_text(SCRIPTED.format(root=str(ROOT)))
    found = {}
    for engine in ("plain", "ddp-2", "zero2-2", "zero3-2"):
        tree = run_tree(
            "deberta", folder / engine, models_dir, "run", schedule={"start": 4, "end": 12, "every": 4},
            resize={"grow_init": "gradient"}, sensitivity={"uncertainty": 0.85},
        )  # fmt: skip
        launch(engine, script, [str(write_config(folder / f"{engine}.yaml", tree))], folder)
        found[engine] = folder / engine / "runs" / "run"
    return found


@pytest.mark.parametrize("engine", ["ddp-2", "zero2-2", "zero3-2"])
def test_layers_leave_and_return_on_every_engine(runs: dict[str, Path], engine: str) -> None:
    assert result_of(runs[engine])["engine"] == engine.split("-")[0]
    assert [list(ranks.values()).count(0) for ranks in ranks_of(runs[engine])] == [4, 0, 4]
    assert ranks_of(runs[engine]) == ranks_of(runs["plain"])
    losses = losses_of(runs["plain"])
    assert len(losses) == 13
    assert losses_of(runs[engine]) == pytest.approx(losses, abs=1e-5)
    assert result_of(runs[engine])["metrics"] == pytest.approx(result_of(runs["plain"])["metrics"], abs=1e-6)
