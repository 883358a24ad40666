"""Small runs with a query of the wanted task."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.runs import GOOD, run_tree
from tests.tiny import WORDS

#: Rows of the pool and of the query.
POOL, QUERY = 48, 12
SHORT: dict[str, dict[str, Any]] = {"allocation": {"policy": "fixed"}, "train": {"max_steps": 4, "lr": 1e-2}}


def queried(
    kind: str, folder: Path, models: Path, name: str = "run", *, seed: int = 5, **sections: dict[str, Any]
) -> dict[str, Any]:
    """A short run on the usual pool of 48 rows and a query of 12, most of them on films."""
    tree = run_tree(kind, folder, models, name)
    for section, values in (SHORT | sections).items():
        tree[section] = tree.get(section, {}) | values
    tree["sampling"] = {"selector": "query"} | sections.get("sampling", {})
    rng = random.Random(seed)
    lines = []
    for _ in range(QUERY):
        words = [*rng.choices(["film", "movie", "plot"], k=4), *rng.choices(WORDS, k=4)]
        label = "yes" if GOOD & set(words) else "no"
        lines.append({"text": " ".join(words), "label": label, "summary": " ".join(words[:3])})
    data = Path(tree["task"]["dataset"]["path"])
    (data / "query.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    tree["task"]["query"] = "query.jsonl"
    return tree
