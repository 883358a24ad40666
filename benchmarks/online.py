#!/usr/bin/env python3
"""What online scores cost a training step, and how far they are those of a pass.

    python benchmarks/online.py cost [--model DIR ...] --length 32 64 128 --repeats 30
    accelerate launch … benchmarks/online.py cost …        # DDP or ZeRO
    python benchmarks/online.py agreement --config FILE --out DIR [--seeds 0,1,2] [section.key=value ...]

``cost`` takes the same step of one run with and without listening, in turns, and prints the median of the ratios within
a turn. Batches are film-review sentences of exactly ``--length`` tokens, r 8 on all linear layers of the blocks.

``agreement`` trains the config's run with ``scoring.source: online`` up to where S is chosen, and scores the pool by a
full pass there: Spearman's correlation of every term, Pearson's of Q (of which log p is a multiple; samples without a
visit are tied), the overlap of S (its random numbers are the same, so that of even p is no small one) and of the best
30 %. What a pass halfway there agrees with the last one shows how much scores move meanwhile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.overhead import DEFAULT_MODEL, tree, write_data
from tsqlora_scale.common.quiet import prepare_environment, quiet_libraries
from tsqlora_scale.config.load import load_config, parse_config
from tsqlora_scale.model.adapters.adapter_type import adapter_type
from tsqlora_scale.quality import QualityScorer, ScoreTable, select_subset
from tsqlora_scale.quality.online.sample_listener import DeafListener
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.step import optimizer_step
from tsqlora_scale.training import take_steps

TERMS = ("loss", "grad_norm", "delta_loss", "convergence", "quality")
#: share of the pool whose best are compared
BEST = 0.3


def step_seconds(run: Run, listens: bool, *, cpu_time: bool) -> float:
    """Of the run's present step, which does not move on."""
    now = time.process_time if cpu_time else time.perf_counter
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = now()
    optimizer_step(
        run.engine,
        run.task,
        run.selector.draw(run.step),
        listener=run.ranks,
        samples=run.selector.listener if listens else DeafListener(),
        step=run.step,
        lr=1e-5,
        micro_batch_size=run.plan.micro_batch_size,
        seed=0,
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return now() - start


def cost(options: argparse.Namespace) -> None:
    """The table of ratios."""
    models = options.model or [DEFAULT_MODEL]
    with tempfile.TemporaryDirectory() as name:
        folders = {length: Path(name) / str(length) for length in options.length}
        runs = {}
        for length, folder in folders.items():
            folder.mkdir()
            write_data(folder, length)
            for model in models:
                settings = argparse.Namespace(**vars(options) | {"model": model, "length": length})
                sections: dict[str, Any] = {
                    "sampling": {"selector": "quality"},
                    "scoring": {"source": "online", "refresh": "none"},
                    "allocation": {"policy": "fixed"},
                }
                runs[model, length] = preflight.check(parse_config(tree(folder, "online", settings, **sections)))
        with quiet_libraries():
            built = {key: build_run(checked) for key, checked in runs.items()}
        main = next(iter(built.values())).is_main
        if main:
            print("| model | tokens | step ms | with online scores | ratio | quartiles |\n|---|---|---|---|---|---|")
        for (model, length), run in built.items():
            plain, heard = [], []
            for turn in range(options.repeats + 1):
                order = (False, True) if turn % 2 else (True, False)
                seconds = {listens: step_seconds(run, listens, cpu_time=options.cpu_time) for listens in order}
                if turn:  # the first turn warms up
                    plain.append(seconds[False])
                    heard.append(seconds[True])
                run.step += 1
            ratios = [b / a for a, b in zip(plain, heard, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            if main:
                times = " | ".join(f"{1e3 * statistics.median(times):.0f}" for times in (plain, heard))
                label = model.rstrip("/").removesuffix("/model").rsplit("/", 1)[-1].removeprefix("package:")
                print(f"| {label} | {length} | {times} | {middle:.3f} | {low:.3f} to {high:.3f} |", flush=True)


def full_pass(run: Run) -> ScoreTable:
    """Scores of the whole pool at the run's present parameters, to first order."""
    config = run.config
    scorer: QualityScorer[Any] = QualityScorer(
        config.scoring.model_copy(update={"source": "pass"}),
        config.sampling,
        pool=run.task,
        theta=partial(adapter_type(config.adapter.type).theta, include_head=config.scoring.include_head),
        world=run.engine.world,
        seed=config.run.seed,
        eta=config.scoring.eta or config.train.lr,
        stratify=config.stratifies,
    )
    return scorer.score(run.engine.module)


def agreement(options: argparse.Namespace) -> None:
    """The table of correlations."""
    from scipy.stats import spearmanr

    print(f"| seed | scores | {' | '.join(TERMS)} | Q, Pearson | common S | best {BEST:.0%} in common |")
    print("|" + "---|" * (len(TERMS) + 5))
    for seed in options.seeds:
        overrides = [f"run.output_dir={options.out}", f"run.name=online-{seed}", f"run.seed={seed}"]
        settings = ["scoring.source=online", "train.eval_every=null", *options.overrides]
        with quiet_libraries():
            run = build_run(preflight.check(load_config(options.config, [*settings, *overrides])))
        end = run.plan.scoring_step
        assert end is not None and end <= run.plan.total_steps, "the run ends before; train longer"
        take_steps(run, until=end // 2)
        halfway = full_pass(run)
        take_steps(run, until=end)
        run.selector.score(run.engine.module, end)
        assert run.selector.table is not None
        online, wanted = run.selector.table.copy(), full_pass(run)
        for name, table in (("online", online), ("a pass halfway", halfway)):
            cells = [f"{spearmanr(getattr(table, t), getattr(wanted, t)).statistic:.3f}" for t in TERMS]
            cells.append(f"{np.corrcoef(table.quality, wanted.quality)[0, 1]:.3f}")
            cells.append(f"{common(table.selected, wanted.selected):.3f}")
            cells.append(f"{common(best_of(table), best_of(wanted)):.3f}")
            print(f"| {seed} | {name} | {' | '.join(cells)} |", flush=True)
        even = select_subset(
            len(wanted),
            np.zeros(len(wanted)),
            run.config.sampling,
            seed=seed,
            always=run.task.query_rows,
            strata=run.task.strata() if run.config.stratifies else None,
        )
        nothing = " | ".join("-" * (len(TERMS) + 1))
        print(f"| {seed} | even p | {nothing} | {common(even, wanted.selected):.3f} | {BEST:.3f} |", flush=True)


def best_of(table: ScoreTable) -> np.ndarray:
    """Which samples belong to the best share, (N,) bool."""
    found = np.zeros(len(table), dtype=bool)
    found[np.argsort(-table.quality, kind="stable")[: max(int(BEST * len(table)), 1)]] = True
    return found


def common(members: np.ndarray, others: np.ndarray) -> float:
    """Share of ``others`` that are ``members``, too."""
    return float((members & others).sum() / others.sum())


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "agreement"])
    parser.add_argument("--model", action="append")
    parser.add_argument("--length", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of this process's CPU time")
    parser.add_argument("--config")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="section.key=value for all runs of agreement")
    options = parser.parse_intermixed_args()
    if options.what == "agreement" and (options.config is None or options.out is None):
        parser.error("agreement needs --config and --out")
    prepare_environment()
    {"cost": cost, "agreement": agreement}[options.what](options)


if __name__ == "__main__":
    main()
