"""Models with layers that no text reaches, that drop layers, or whose weights lie the other way round, on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import zoo
from tests.distributed.launch import WORKER, launch
from tests.runs import losses_of, ranks_of, run_tree, write_config, write_data

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(3000)]

#: kind -> the base's quantisation
CASES = [("gemma3", "none"), ("bart-layerdrop", "none"), ("gpt2", "none"), ("gpt2", "nf4")]


def trained(engine: str, folder: Path, models: Path) -> list[tuple[list[float], list[dict[str, int]]]]:
    """Losses and ranks of every case's run under an engine."""
    configs = []
    for kind, quantization in CASES:
        task = "seq2seq" if kind in zoo.SEQ2SEQ else "causal"
        name = f"{kind}-{quantization}"
        tree = run_tree(
            "bert", folder, models, name, allocation={"phi_min": 0.9, "phi_max": 1.0}, train={"max_steps": 10}
        )
        tree["scoring"]["refresh"] = "none"
        tree["model"] |= {"name_or_path": str(zoo.saved(kind, models, task)), "quantization": quantization}
        tree["task"] = write_data(folder / f"data-{task}", task)
        configs.append(str(write_config(folder / f"{name}.yaml", tree)))
    launch(engine, WORKER, configs, folder, timeout=1500)
    folders = [folder / "runs" / "-".join(case) for case in CASES]
    return [(losses_of(run), ranks_of(run)) for run in folders]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> list[tuple[list[float], list[dict[str, int]]]]:
    return trained("plain", tmp_path_factory.mktemp("plain"), models_dir)


@pytest.mark.parametrize("engine", ["ddp-2", "zero3-2"])
def test_the_same_run(
    engine: str, alone: list[tuple[list[float], list[dict[str, int]]]], tmp_path: Path, models_dir: Path
) -> None:
    for (losses, ranks), (expected, expected_ranks) in zip(trained(engine, tmp_path, models_dir), alone, strict=True):
        assert len(losses) == 10
        assert losses == pytest.approx(expected, abs=1e-5)
        assert ranks == expected_ranks
