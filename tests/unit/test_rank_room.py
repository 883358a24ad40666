"""Policies that could do nothing are refused where a run starts, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import run_tree
from tests.unit.config_trees import tree
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.run import preflight
from tsqlora_scale.run.rank_room import check_ranks_can_move

STUCK: list[tuple[dict[str, Any], str]] = [
    *(
        (
            {"allocation__policy": policy, "allocation__r_min": 8},
            f"allocation.policy={policy} moves ranks from one layer to another, and none can leave adapter.r=8 with "
            "allocation.r_min=8",
        )
        for policy in ("tsqlora", "gain", "elalora")
    ),
    ({"allocation__r_max": 8}, "none can leave adapter.r=8 with allocation.r_max=8; raise it"),
    ({"adapter__r": 1}, "none can leave adapter.r=1 with allocation.r_min=1; lower it"),
    ({"allocation__policy": "adalora", "allocation__target_r": 8}, "of adapter.r=8 none is left over"),
    ({"allocation__policy": "adalora", "allocation__r_min": 8}, "with allocation.r_min=8 at the least"),
    ({"allocation__policy": "adalora", "adapter__r": 1}, "of adapter.r=1 none is left over"),
    (
        {"allocation__policy": "gain", "sensitivity__every": 10},
        "sensitivity.window=10 has one at sensitivity.every=10; raise the first above the second",
    ),
]
FREE: list[dict[str, Any]] = [
    {},
    {"allocation__policy": "elalora", "allocation__r_max": 8},
    {"allocation__policy": "adalora"},
    {"adapter__r": 1, "allocation__r_min": 0},
    {"allocation__r_min": 8, "sampling__selector": "quality"},
    {"allocation__r_min": 8, "sampling__selector": "mine.py:Mine"},
    {"allocation__r_min": 8, "allocation__policy": "gain", "allocation__budget": "auto"},
    {"allocation__r_min": 8, "adapter__init_from": "run"},
    {"allocation__policy": "gain", "sensitivity__every": 10, "sensitivity__window": 11},
    {"allocation__policy": "fixed", "adapter__r": 1},
]


def config_of(changes: dict[str, Any]) -> Any:
    return parse_config(tree(**{"sampling__selector": "full"} | changes))


@pytest.mark.parametrize(("changes", "words"), STUCK, ids=[words[-40:] for _, words in STUCK])
def test_nothing_could_move(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_ranks_can_move(config_of(changes))
    assert words in str(caught.value)


@pytest.mark.parametrize("changes", FREE, ids=str)
def test_something_can(changes: dict[str, Any]) -> None:
    check_ranks_can_move(config_of(changes))


def test_a_start_is_refused_and_a_run_that_is_there_is_not(tmp_path: Path, models_dir: Path) -> None:
    config = parse_config(
        run_tree("bert", tmp_path, models_dir, "run", adapter={"r": 1}, sampling={"selector": "full"})
    )
    with pytest.raises(UserError, match=r"none can leave adapter\.r=1"):
        preflight.check(config)
    assert preflight.check(config, starts=False).plan.total_steps == 13
