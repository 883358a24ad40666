"""What ``scoring.source: online`` does without is refused, in one line that says what to set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import run_tree
from tests.unit.config_trees import message, tree
from tsqlora_scale.api import score
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.config.schema import Config


def online(**scoring: Any) -> dict[str, Any]:
    return tree(scoring={"source": "online"} | scoring)


def test_the_loss_reduction_is_first_order_by_itself() -> None:
    config = parse_config(online())
    assert config.scores_online and config.scoring.delta_loss == "first_order"
    assert Config.model_validate(config.model_dump()) == config, "as a run folder's config.yaml has it"
    assert parse_config(tree()).scoring.source == "pass"
    assert not parse_config(online() | {"sampling": {"selector": "full"}}).scores_online


@pytest.mark.parametrize(
    ("scoring", "remedy"),
    [
        ({"delta_loss": "exact"}, "set 'delta_loss: first_order'"),
        ({"convergence": "loss_trend"}, "set 'convergence: alignment'"),
        ({"proxy_model": "small", "refresh": "none"}, "set 'proxy_model: null'"),
        ({"max_samples": 10}, "set 'max_samples: null'"),
        ({"max_length": 10, "keep_sketches": True}, "set 'max_length: null', 'keep_sketches: false'"),
    ],
)
def test_what_only_a_pass_has_is_refused(scoring: dict[str, Any], remedy: str) -> None:
    found = message(online(**scoring))
    assert "'source: online' does without a pass over the pool" in found
    assert found.rstrip().endswith(remedy)


def test_redundancy_needs_sketches() -> None:
    assert "'scoring.source: online' keeps none" in message(online() | {"sampling": {"redundancy": 1.0}})


def test_scoring_without_training_is_refused(tmp_path: Path, models_dir: Path) -> None:
    config = run_tree("bert", tmp_path, models_dir, "run")
    config["scoring"] = {"source": "online"}
    with pytest.raises(UserError, match=r"^scoring.source='online' .* set scoring.source=pass$"):
        score(parse_config(config))
    assert not (tmp_path / "runs").exists()
