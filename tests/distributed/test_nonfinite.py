"""All ranks leave the same steps out, on every engine, and go on alike; or all end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch, run_launched
from tests.runs import losses_of, ranks_of, read_lines, result_of, run_tree, write_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

POISONED = Path(__file__).with_name("poisoned.py")


def failed_steps(run_dir: Path) -> list[tuple[int, Any, Any]]:
    """Step, samples and culprits of the steps that were left out."""
    lines = read_lines(run_dir / "metrics.jsonl")
    return [(n["step"], n["nonfinite"]["sample_ids"], n["nonfinite"]["culprits"]) for n in lines if "nonfinite" in n]


def test_every_engine_leaves_the_same_steps_out(tmp_path: Path, models_dir: Path) -> None:
    """What a step that is left out must not change is asserted in the processes, on every rank."""
    runs = {}
    for engine in ("plain", "ddp-2", "zero2-2", "zero3-2"):
        tree = run_tree("bert", tmp_path / engine, models_dir, "run", train={"micro_batch_size": 2})
        tree["scoring"]["refresh"] = "none"
        config = write_config(tmp_path / engine / "config.yaml", tree)
        said = launch(engine, POISONED, [str(config)], tmp_path, timeout=300)
        runs[engine] = tmp_path / engine / "runs" / "run"
        assert said.count("a gradient of norm") == 4, "one warning a step, from one rank"
        assert result_of(runs[engine])["engine"] == engine.split("-")[0]
        assert [step for step, _, _ in failed_steps(runs[engine])] == [1, 4, 6, 10]
        assert failed_steps(runs[engine]) == failed_steps(runs["plain"])
        assert len(losses_of(runs["plain"])) == 9
        assert losses_of(runs[engine]) == pytest.approx(losses_of(runs["plain"]), abs=1e-5)
        assert ranks_of(runs[engine]) == ranks_of(runs["plain"])


@pytest.mark.parametrize("engine", ["ddp-2", "zero3-2"])
def test_too_many_end_every_rank(tmp_path: Path, models_dir: Path, engine: str) -> None:
    config = write_config(
        tmp_path / "config.yaml",
        run_tree("bert", tmp_path, models_dir, "run", train={"max_nonfinite": 1, "micro_batch_size": 2}),
    )
    done = run_launched(engine, POISONED, [str(config)], tmp_path, timeout=120)
    assert done.returncode != 0
    assert done.stdout.count("error: train.max_nonfinite=1, and step 4 has a loss of nan") == 2, "on both ranks"
    assert "Traceback" not in done.stdout.split("error: train")[0], done.stdout
    assert "exitcode  : 2" in done.stdout
    assert not (tmp_path / "runs" / "run" / "result.json").exists()
