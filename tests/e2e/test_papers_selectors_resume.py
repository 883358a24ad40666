"""Runs by the papers' selectors that are cut short go on to the bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.runs import go, losses_of, run_tree
from tests.steps import Killed, killed_in_step
from tests.tiny import WORDS
from tsqlora_scale import training as loop

pytestmark = pytest.mark.slow

#: Killed before and after the choice, which the warm-up of two steps comes before.
RUNS: list[tuple[str, int, dict[str, str]]] = [
    ("less", 6, {}),
    ("less", 3, {"less_gradients": "adam"}),
    ("less", 1, {"less_gradients": "adam"}),
    ("infobatch", 9, {}),
    ("rs2", 6, {}),
]


@pytest.mark.parametrize(("name", "step", "keys"), RUNS)
def test_a_killed_run_goes_on(
    name: str, step: int, keys: dict[str, str], tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices(WORDS, k=6)), "label": "yes"} for _ in range(12)]
    (tmp_path / "query.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = {"selector": name, "keep_fraction": "auto" if name == "infobatch" else 0.5} | keys

    def tree(run: str) -> dict[str, Any]:
        found = run_tree(
            "bert",
            tmp_path,
            models_dir,
            run,
            sampling=sampling,
            allocation={"policy": "fixed"},
            train={"checkpoint_every": 3, "micro_batch_size": 6},
        )
        found["task"]["query"] = str(tmp_path / "query.jsonl")
        return found

    go(tree("whole"))
    killed = tree("killed")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", killed_in_step(step))
        with pytest.raises(Killed):
            go(killed)
    go(killed, resume="auto")
    assert losses_of(tmp_path / "runs" / "killed") == losses_of(tmp_path / "runs" / "whole")
