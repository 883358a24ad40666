"""Comparisons whose runs are made up: a shell command puts a result where a run would."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.unit.config_trees import MINIMAL
from tsqlora_scale.comparison.comparison_run import ComparisonRun
from tsqlora_scale.comparison.processes import Launch
from tsqlora_scale.config.load import load_config
from tsqlora_scale.config.schema import Config

#: Two arms on one task, three seeds.
TREE: dict[str, Any] = {
    "tasks": {"words": {}},
    "arms": {"lora": {"adapter.method": "lora"}, "tsqlora": {"adapter.method": "tsqlora"}},
    "baseline": "lora",
    "seeds": [0, 1, 2],
}
LAYERS = [f"base_model.model.bert.encoder.layer.{n}.{kind}" for n in range(2) for kind in ("query", "output.dense")]


def write_comparison(folder: Path, **changes: Any) -> Path:
    """A comparison's file beside the config of its task."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "words.yaml").write_text(MINIMAL.replace("train.tsv}", "train.tsv, dev_file: dev.tsv}"), encoding="utf-8")
    tree = json.loads(json.dumps(TREE | changes))
    for task in tree["tasks"].values():
        task.setdefault("config", str(folder / "words.yaml"))
    (folder / "fake.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return folder / "fake.yaml"


def comparison(folder: Path, *, overrides: Sequence[str] = (), small: bool = False, **changes: Any) -> ComparisonRun:
    """A comparison in ``folder/out``."""
    file = write_comparison(folder, **changes)
    return ComparisonRun(file, out=folder / "out", overrides=overrides, small=small)


def accuracy_of(config: Config) -> float:
    """The best learning rate is 0.002; the arm that moves ranks is a little better, every seed its own."""
    value = 0.9 - abs(config.train.lr - 2e-3) * 10 - 0.01 * config.run.seed
    return value + (0.02 if config.adapts_ranks else 0.0) + 0.001 * config.run.seed * config.adapts_ranks


def result_of(config: Config, accuracy: float, **changes: Any) -> dict[str, Any]:
    """A ``result.json``."""
    steps = config.train.max_steps or 1
    return {
        "name": config.run.name,
        "method": config.adapter.method,
        "engine": "plain",
        "seed": config.run.seed,
        "task": {
            "type": "classification", "data": [], "metrics": ["accuracy"], "decides": "accuracy",
            "higher_is_better": True,
        },
        "model": {"name": "some/model", "revision": None, "commit": None, "dtype": "fp32", "quantization": "none"},
        "data": {"train": "a" * 64, "dev": ("b" if config.task.dataset.dev_half is None else "c") * 64},
        "code": {"version": "1", "source": "0123456789abcdef"},
        "steps": steps,
        "metrics": {"accuracy": accuracy, "f1": accuracy - 0.1},
        "metric_titles": {"accuracy": "accuracy", "f1": "f1 (of class yes)"},
        "seconds": {"load": 1.0, "warmup": 0.5, "training": steps * 0.5, "scoring": 2.0 * config.adapts_ranks},
        "trainable_parameters": 1000 * config.adapter.r,
        "distinct_samples_seen": 100,
        "samples_drawn": 32 * steps,
        "samples_per_second": 20.0,
        "peak_memory_bytes": [2**28, 2**29],
        "ranks_start": {name.removeprefix("base_model.model."): config.adapter.r for name in LAYERS},
        "ranks_end": {name.removeprefix("base_model.model."): config.adapter.r for name in LAYERS},
    } | changes  # fmt: skip


@dataclass(frozen=True)
class FakeLaunch(Launch):
    """Starts commands of the shell in the place of runs.

    Attributes:
        scratch: a folder of this launch's own.
        results: of a run's config; None where the run fails.
        started: the names of the runs, in order.
    """

    scratch: Path = Path("scratch")
    results: Callable[[Config], Mapping[str, Any] | None] = lambda config: result_of(config, accuracy_of(config))
    started: list[str] = field(default_factory=list)

    def command(self, arguments: Sequence[str]) -> list[str]:
        config = load_config(arguments[1], list(arguments[2:-2]))
        assert arguments[-2:] == ["--resume", "auto"]
        name = f"{Path(config.run.output_dir).name}/{config.run.name}"
        self.started.append(name)
        result = self.results(config)
        if result is None:
            return ["sh", "-c", "echo 'error: adapter.r=8: too much'; exit 2"]
        made = self.scratch / Path(config.run.output_dir).parent.name / name
        write_run(made, config, result)
        target = shlex.quote(str(config.run_dir))
        return ["sh", "-c", f"mkdir -p {target} && cp -r {shlex.quote(str(made))}/. {target}"]


def write_run(folder: Path, config: Config, result: Mapping[str, Any]) -> None:
    """A run folder."""
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    if config.adapts_ranks:
        events = [
            {
                "step": step,
                "sensitivity": {name: 0.1 + place * step / 10 for place, name in enumerate(LAYERS)},
                "ranks": {name: place + step for place, name in enumerate(LAYERS)},
            }
            for step in (1, 2)
        ]
        lines = "".join(json.dumps(event) + "\n" for event in events)
        (folder / "ranks.jsonl").write_text(lines, encoding="utf-8")
