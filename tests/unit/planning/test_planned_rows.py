"""Which rows a plan counts: the query's, those of a mixture's held-out sets, and how often these are judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.queried import QUERY, queried
from tests.runs import run_tree
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.planning.planner import plan
from tsqlora_scale.run import preflight


@pytest.fixture
def tree(tmp_path: Path, models_dir: Path) -> dict[str, Any]:
    return run_tree("bert", tmp_path, models_dir, "run")


def test_a_mixture_is_evaluated_too(tree: dict[str, Any]) -> None:
    task = {key: value for key, value in tree["task"].items() if key != "dataset"}
    sets = [{"name": name, "dataset": tree["task"]["dataset"]} for name in ("a", "b")]
    mixed, plain = (
        plan(parse_config(each), machine="cpu") for each in (tree | {"task": task | {"mixture": sets}}, tree)
    )
    steps = [found.times.steps["evaluation"] for found in (mixed, plain)]
    assert steps[0] == 2 * steps[1] > 0, "each set has its own held-out rows"


@pytest.mark.parametrize("method", ["lora", "bitfit", "full"])
def test_a_choice_by_forwards_is_planned_for_all_that_trains(method: str, tmp_path: Path, models_dir: Path) -> None:
    """64 samples a batch and every layer's states, of whatever is trained afterwards."""
    tree = queried("bert", tmp_path, models_dir, sampling={"selector": "query", "keep_fraction": "auto"})
    tree["adapter"] = {"method": method}
    tree = {key: value for key, value in tree.items() if key not in ("schedule", "sensitivity")}
    tree["scoring"] = {"batch_size": "auto"}
    found = plan(parse_config(tree), machine="cpu")
    tree["scoring"] = {"batch_size": 64}
    same = plan(parse_config(tree), machine="cpu")
    assert found.engines[0].phases["scoring"] == same.engines[0].phases["scoring"] > 0
    assert found.times.steps["scoring"] == same.times.steps["scoring"] > 0


def test_a_choice_by_words_costs_no_pass(tmp_path: Path, models_dir: Path) -> None:
    tree = queried("bert", tmp_path, models_dir, sampling={"selector": "dsir", "keep_fraction": 0.5})
    found = plan(parse_config(tree), machine="cpu")
    assert found.times.steps["scoring"] == 0


def test_rows_of_the_query_are_in_every_choice(tmp_path: Path, models_dir: Path) -> None:
    """The plan of a run says what the run will do, and the run is not refused by other numbers."""
    changes: dict[str, Any] = {"sampling": {"selector": "less", "keep_fraction": 0.05}}
    changes |= {"scoring": {"warmup_steps": 4}, "train": {"max_steps": None, "epochs": 6}}
    config = parse_config(queried("bert", tmp_path, models_dir, **changes))
    run = preflight.check(config).plan
    assert (run.query_rows, run.total_steps) == (QUERY, 8)
    found = plan(config, machine="cpu").plan
    assert (found.query_rows, found.total_steps, found.subset_size) == (QUERY, 8, run.subset_size)


def test_evaluations_of_a_run(tree: dict[str, Any]) -> None:
    """On its start, every four steps, and after the last."""
    train = parse_config(tree | {"train": tree["train"] | {"eval_every": 4}}).train
    assert [train.evaluations(steps) for steps in (11, 12, 13)] == [4, 4, 5]
