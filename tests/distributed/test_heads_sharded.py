"""A head under ZeRO-3: reordered, exchanged, started where numbers lie, or as it is, it trains as on one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.classifiers import tiny_classifier
from tests.distributed.launch import WORKER, launch
from tests.runs import losses_of, run_tree, write_config, write_data

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

#: name -> kind, labels of the checkpoint, quantization, whether the head trains
CASES: dict[str, tuple[str, Any, str, bool]] = {
    "reordered": ("deberta", ["yes", "no"], "none", True),
    "exchanged": ("bart", 3, "none", True),
    "nf4": ("deberta", ["yes", "no"], "nf4", True),
    "kept": ("bert", ["no", "yes"], "none", False),
    "numbers": ("bart", 3, "none", True),
}
SHORT: dict[str, Any] = {"sampling": {"selector": "full"}, "allocation": {"policy": "fixed"}, "train": {"max_steps": 3}}


def as_numbers(folder: Path) -> dict[str, Any]:
    """The task's data, a yes as 7 and a no as 5."""
    task = write_data(folder, "classification")
    for path in folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row | {"label": 5 + 2 * (row["label"] == "yes")}) + "\n" for row in rows))
    return task | {"type": "regression", "labels": None, "metrics": ["mse"]}


def test_as_on_one_process(tmp_path: Path, models_dir: Path) -> None:
    finished = {}
    for engine in ("plain", "zero3-2"):
        configs = []
        for name, (kind, labels, quantization, trains) in CASES.items():
            model = tmp_path / name
            if not model.exists():
                tiny_classifier(kind, model, labels)
            tree = run_tree("bert", tmp_path / engine, models_dir, name, **SHORT)
            tree["model"] = {"name_or_path": str(model), "quantization": quantization}
            tree["adapter"]["train_head"] = trains
            if name == "numbers":
                tree["task"] |= as_numbers(tmp_path / engine / "numbers")
            configs.append(str(write_config(tmp_path / engine / f"{name}.yaml", tree)))
        launch(engine, WORKER, configs, tmp_path)
        finished[engine] = tmp_path / engine / "runs"
    for name in CASES:
        plain, sharded = (finished[engine] / name for engine in ("plain", "zero3-2"))
        assert losses_of(sharded) == pytest.approx(losses_of(plain), abs=1e-5)
        assert name != "numbers" or losses_of(plain)[0] < 4, "25 from 0"
        expected = load_file(plain / "adapter" / "adapter_model.safetensors")
        found = load_file(sharded / "adapter" / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        for tensor, value in expected.items():
            torch.testing.assert_close(found[tensor], value, rtol=0, atol=1e-4)
