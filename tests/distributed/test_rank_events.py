"""Rank events that the method's own policy seldom makes, under every engine: layers removed and brought back,
grown where their gradients point; components chosen one by one; and processes whose plans differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import ROOT, WORKER, launch, run_launched
from tests.runs import losses_of, ranks_of, result_of, run_tree, write_config
from tsqlora_scale.run.checkpoint import complete_checkpoints, verify_checkpoint

# the first test makes the runs of all engines
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(3000)]


#: Policies that choose components, and the base that their triplets are on.
CHOOSING = {"adalora": {}, "elalora": {"quantization": "nf4", "quant_storage": "fp32"}}


def choosing_tree(method: str, folder: Path, models: Path) -> dict[str, Any]:
    """A run by a method that chooses components, with events after steps 4, 6, 8 and 10, of 11."""
    tree = run_tree(
        "bert", folder, models, method, schedule={"start": 4, "end": 10, "every": 2}, model=CHOOSING[method],
        train={"max_steps": 11, "micro_batch_size": 6},
    )  # fmt: skip
    tree["adapter"] = {"method": method, "r": 6, "alpha": 12}
    return {key: values for key, values in tree.items() if key not in ("scoring", "sampling", "sensitivity")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> dict[str, Path]:
    """Run folders by engine; beside each those of the methods that choose components."""
    folder = tmp_path_factory.mktemp("resizing")
    found = {}
    for engine in ("plain", "ddp-2", "zero2-2", "zero3-2"):
        tree = run_tree(
            "deberta", folder / engine, models_dir, "run", schedule={"start": 4, "end": 12, "every": 4},
            resize={"grow_init": "gradient"}, sensitivity={"uncertainty": 0.85},
            allocation={"policy": "tests.policies:RemoveAndRestore"},
        )  # fmt: skip
        trees = {
            "run": tree,
            **{method: choosing_tree(method, folder / engine, models_dir) for method in CHOOSING},
        }
        files = [write_config(folder / f"{engine}-{name}.yaml", one) for name, one in trees.items()]
        launch(engine, WORKER, list(map(str, files)), folder)
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


@pytest.mark.parametrize("method", list(CHOOSING))
@pytest.mark.parametrize("engine", ["ddp-2", "zero2-2", "zero3-2"])
def test_the_same_components_stay_on_every_engine(runs: dict[str, Path], engine: str, method: str) -> None:
    """Importances are heard where factors are sharded as they are where none is, and triplets resized."""
    alone, together = (runs[name].with_name(method) for name in ("plain", engine))
    assert result_of(together)["engine"] == engine.split("-")[0]
    totals = [sum(ranks.values()) for ranks in ranks_of(alone)]
    assert totals == ([72, 55, 48, 48] if method == "adalora" else [72] * 4)
    assert ranks_of(together) == ranks_of(alone)
    assert losses_of(together) == pytest.approx(losses_of(alone), abs=1e-5)
    assert result_of(together)["metrics"] == pytest.approx(result_of(alone)["metrics"], abs=1e-6)


#: The second event of rank 1 sees other sensitivities than that of rank 0.
TAMPERED = """
import sys
sys.path.insert(0, {root!r})
from tsqlora_scale.commands.train import main
from tsqlora_scale.ranks import SensitivityTracker

reduce, events = SensitivityTracker.reduce, []

def tampered(tracker, world):
    found = reduce(tracker, world)
    events.append(1)
    if len(events) == 2 and world.rank == 1:
        found = {{name: value if i else 100 * value for i, (name, value) in enumerate(found.items())}}
    return found

SensitivityTracker.reduce = tampered
sys.exit(main())
"""


def test_a_rank_with_a_plan_of_its_own_stops_all_before_anything_changes(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"checkpoint_every": 6})
    config = write_config(tmp_path / "config.yaml", tree)
    script = tmp_path / "tampered.py"
    script.write_text(TAMPERED.format(root=str(ROOT)))
    done = run_launched("ddp-2", script, ["--config", str(config)], tmp_path)
    assert done.returncode != 0
    for rank in (0, 1):
        assert f"rank {rank} has failed:" in done.stdout
    assert done.stdout.count("PlanMismatch: rank plans differ between processes: rank(s) 1 of 2 disagree") >= 2
    run_dir = tmp_path / "runs" / "run"
    assert len(ranks_of(run_dir)) == 1, "no line of an event that did not happen"
    assert len(losses_of(run_dir)) == 8
    assert not (run_dir / "adapter").exists()
    (*_, newest) = complete_checkpoints(run_dir / "checkpoints")
    assert newest.name == "step-00000006"
    verify_checkpoint(newest)
    train = ROOT / "launch" / "train.py"
    launch("plain", train, ["--config", str(config), "--resume", "auto"], tmp_path)
    launch("plain", train, ["--config", str(config), f"run.output_dir={tmp_path / 'whole'}"], tmp_path)
    assert losses_of(run_dir) == pytest.approx(losses_of(tmp_path / "whole" / "run"), abs=1e-5)
    assert ranks_of(run_dir) == ranks_of(tmp_path / "whole" / "run")
