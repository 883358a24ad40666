"""Small whole runs on tiny models: data, configs, and what a finished run folder says."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import WORDS, tiny_model
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.training import train_to_the_end

GOOD = {"good", "great", "fine", "lovely", "strong"}


def write_data(folder: Path, task_type: str, rows: int = 48) -> dict[str, Any]:
    """A small pool with something to learn in it, and the task section that reads it."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", rows), ("dev", 8)):
        lines = []
        for _ in range(count):
            words = rng.choices(WORDS, k=rng.randint(4, 10))
            label = "yes" if GOOD & set(words) else "no"
            lines.append({"text": " ".join(words), "label": label, "summary": " ".join(words[:3])})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task: dict[str, Any] = {
        "type": task_type,
        "dataset": {"path": str(folder), "train_file": "train.jsonl", "dev_file": "dev.jsonl"},
        "max_length": 32,
        "max_target_length": 6,
        "num_beams": 2,
    }
    if task_type == "classification":
        return task | {"text": ["text"], "label": "label", "labels": ["no", "yes"], "metrics": ["accuracy"]}
    return task | {"source": "text", "target": "summary", "metrics": ["rougeL"]}


TASKS = {
    "bert": "classification",
    "deberta": "classification",
    "bart": "seq2seq",
    "t5": "seq2seq",
    "llama": "causal",
    "gpt2": "causal",
}


def run_tree(kind: str, folder: Path, models: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run of 13 steps with scoring after step 2 and rank events after steps 4 and 8, dropout 0. Passes are few: what
    they cost, most of all under ZeRO-3, is their number. On two ranks they hold the samples that those of one process
    hold; on three they do not, and a rounding may become a decision."""
    tree: dict[str, Any] = {
        "run": {"name": name, "output_dir": str(folder / "runs"), "seed": 1, "timeout_minutes": 4},
        "model": {"name_or_path": str(tiny_model(kind, models))},
        "task": write_data(folder / f"data-{TASKS[kind]}", TASKS[kind]),
        "adapter": {"r": 4, "alpha": 8},
        "scoring": {"warmup_steps": 2, "batch_size": 24, "sketch_dim": 64, "refresh_fraction": 0.5},
        "sampling": {"keep_fraction": 0.75},
        "sensitivity": {"window": 3},  # of four steps between events
        "schedule": {"start": 4, "end": 8, "every": 4},
        "train": {
            "max_steps": 13,
            "batch_size": 12,
            "micro_batch_size": 6,
            "lr": 1e-2,
            "lr_schedule": "constant",
            "eval_batch_size": 8,
        },
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return tree


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    """The tree as a YAML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses_of(run_dir: Path) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in read_lines(run_dir / "metrics.jsonl") if "loss" in line]


def ranks_of(run_dir: Path) -> list[dict[str, int]]:
    """The ranks after every event."""
    return [line["ranks"] for line in read_lines(run_dir / "ranks.jsonl")]


def result_of(run_dir: Path) -> dict[str, Any]:
    """``result.json``."""
    result: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    return result


def go(tree: dict[str, Any], resume: str | None = None) -> Run:
    """A whole run in this process."""
    run = build_run(preflight.check(parse_config(tree)), resume=resume)
    train_to_the_end(run)
    return run
