"""Runs whose texts are of very different lengths, a sample a row or several."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runs import losses_of, ranks_of, run_tree
from tests.tiny import WORDS
from tsqlora_scale.quality import ScoreTable

#: Four micro-batches a step.
SIZES = {"batch_size": 12, "micro_batch_size": 3, "max_steps": 6}


def mixed_tree(kind: str, folder: Path, models: Path, *, packing: bool, **sections: Any) -> dict[str, Any]:
    """A run of six steps with a scoring pass after step 2 and a rank event after step 4; every third text is long."""
    train = SIZES | {"packing": packing, "eval_batch_size": 8}
    schedule = {"start": 4, "end": 4, "every": 4}
    name = "packed" if packing else "plain"
    tree = run_tree(kind, folder, models, name, **({"train": train, "schedule": schedule} | sections))
    rng = random.Random(0)
    lines = []
    for number in range(48):
        words = rng.choices(WORDS, k=rng.randint(1, 4) if number % 3 else rng.randint(16, 22))
        lines.append({"text": " ".join(words), "label": "no", "summary": " ".join(words[:3])})
    file = Path(tree["task"]["dataset"]["path"]) / "train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return tree


def assert_same_run(packed: Path, plain: Path) -> None:
    """Losses of all steps, ranks and scores are the same."""
    assert losses_of(packed) == pytest.approx(losses_of(plain), abs=1e-5)
    assert ranks_of(packed) == ranks_of(plain) != []
    (found, _), (wanted, _) = (ScoreTable.read(folder / "scores") for folder in (packed, plain))
    np.testing.assert_array_equal(found.selected, wanted.selected)
    for name in ("loss", "grad_norm", "delta_loss", "convergence", "quality", "probability"):
        column = getattr(wanted, name)
        np.testing.assert_allclose(getattr(found, name), column, rtol=1e-3, atol=1e-4 * np.nanmax(np.abs(column)))
