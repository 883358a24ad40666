"""FSDP2 against one process: the same trajectory, and the base really is sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import WORKER, launch
from tests.runs import go, losses_of, ranks_of, result_of, run_tree, write_config

# the first test of an engine makes its runs
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]

#: engine -> its runs: name, model, what is said of it. BART shares embeddings. DeBERTa is compared with other engines
#: (test_engines).
RUNS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "fsdp2-2": [
        ("bart-nf4", "bart", {"quantization": "nf4", "quant_storage": "fp32"}),
        ("bert-bf16", "bert", {"dtype": "bf16"}),
    ],
    "fsdp2-3": [("llama", "llama", {"gradient_checkpointing": True})],
}
NAMES = [(engine, name) for engine, runs in RUNS.items() for name, _, _ in runs]
#: Parameters that stay whole: BART's position embeddings and its shared ones, BERT's of two kinds.
WHOLE = {"bart-nf4": 3, "bert-bf16": 2, "llama": 0}


class Finished(dict[str, dict[str, tuple[Path, Path]]]):
    """Run folders by engine and name, each with that of one process; made when they are first asked for."""

    def __init__(self, factory: pytest.TempPathFactory, models: Path) -> None:
        super().__init__()
        self._factory, self._models = factory, models

    def __missing__(self, engine: str) -> dict[str, tuple[Path, Path]]:
        folders = [self._factory.mktemp(name) for name in ("plain", engine)]
        configs, found = [], {}
        for name, kind, model in RUNS[engine]:
            # a budget that does not grow: where one layer grows another one shrinks
            options = {"model": model, "allocation": {"phi_min": 0.9, "phi_max": 1.0}}
            alone, sharded = (run_tree(kind, folder, self._models, name) for folder in folders)
            for tree in (alone, sharded):
                for section, values in options.items():
                    tree[section] = tree.get(section, {}) | values
            go(alone)
            configs.append(str(write_config(folders[1] / f"{name}.yaml", sharded)))
            found[name] = (folders[0] / "runs" / name, folders[1] / "runs" / name)
        launch(engine, WORKER, configs, folders[1])
        self[engine] = found
        return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Finished:
    return Finished(tmp_path_factory, models_dir)


@pytest.mark.parametrize(("engine", "name"), NAMES)
def test_a_rank_holds_its_share_of_the_base(finished: Finished, engine: str, name: str) -> None:
    alone, sharded = (result_of(run) for run in finished[engine][name])
    assert (sharded["engine"], sharded["distributed_type"]) == ("fsdp2", "FSDP")
    assert sharded["world_size"] == int(engine[-1])
    frozen = sharded["frozen_parameters"]
    assert frozen["all"] - frozen["sharded"] == WHOLE[name]
    size, held = (sum(result["frozen_parameters"]["bytes"].values()) for result in (alone, sharded))
    assert held < (0.75 if name == "bart-nf4" else 0.6) * size, "a packed model's embeddings weigh most"


@pytest.mark.parametrize(("engine", "name"), NAMES)
def test_same_trajectory(finished: Finished, engine: str, name: str) -> None:
    alone, sharded = finished[engine][name]
    assert len(losses_of(alone)) == 13
    # bf16: until scores and ranks, which are decisions, amplify rounding
    until, tolerance = (3, 5e-3) if name == "bert-bf16" else (13, 1e-5)
    assert losses_of(sharded)[:until] == pytest.approx(losses_of(alone)[:until], abs=tolerance)
    if until == 13:
        assert ranks_of(sharded) == ranks_of(alone)
        assert result_of(sharded)["metrics"] == pytest.approx(result_of(alone)["metrics"], abs=1e-6)
        changes = [set(ranks.values()) for ranks in ranks_of(alone)]
        assert min(map(min, changes)) < 4 < max(map(max, changes)), "layers shrink, and layers grow"
