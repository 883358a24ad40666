"""Small runs on a mixture of two files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.runs import GOOD, run_tree
from tests.tiny import WORDS


def words(path: Path, rows: int, text: str, label: str, seed: int) -> dict[str, Any]:
    """A file of lines with a good word in them or none, and the keys of a set that read it."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            chosen = rng.choices(WORDS, k=rng.randint(4, 10))
            file.write(json.dumps({text: " ".join(chosen), label: "yes" if GOOD & set(chosen) else "no"}) + "\n")
    return {"text": text, "label": label, "dataset": {"train_file": str(path)}}


def mixed_tree(folder: Path, models: Path, name: str, **sampling: Any) -> dict[str, Any]:
    """A run on 36 rows of one file and 12 of another, half of the draws from each."""
    tree = run_tree("bert", folder, models, name, sampling=sampling, train={"checkpoint_every": 5, "eval_every": 5})
    many = words(folder / "many.jsonl", 36, "text", "label", 0) | {"name": "many", "weight": 1}
    few = words(folder / "few.jsonl", 12, "review", "good", 1) | {"name": "few", "weight": 1.0}
    many["dataset"]["dev_file"] = few["dataset"]["train_file"].replace("few", "many")
    few["dataset"]["dev_file"] = few["dataset"]["train_file"]
    task = {key: value for key, value in tree["task"].items() if key not in ("dataset", "text", "label")}
    return tree | {"task": task | {"mixture": [many, few]}}
