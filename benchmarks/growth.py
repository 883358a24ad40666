#!/usr/bin/env python3
"""The loss after a rank event, by where new rows of A point and by what becomes of the moments.

    python benchmarks/growth.py --config configs/quickstart.yaml --out DIR [--seeds 0,1,2] [--event 40] [--steps 50] \\
        [--plan method|double] [section.key=value ...]

For every seed one run trains to the event, on uniform samples. From its checkpoint every variant goes through the same
event and the same batches. Printed is the mean loss of the steps after it, and, because the variants share everything
else, the difference from the first variant within a seed. ``reset`` forgets all moments and Adam's step count at the
event, as a new optimizer would; there is no config key for it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

#: name -> (resize.grow_init, whether moments are forgotten)
VARIANTS = {
    "orthogonal": ("orthogonal", False),
    "gaussian": ("gaussian", False),
    "gradient": ("gradient", False),
    "orthogonal, moments reset": ("orthogonal", True),
}


def forgetting(rebuild: Callable[[Any], None]) -> Callable[[Any], None]:
    """``Engine.rebuild`` with a fresh optimizer."""
    from tsqlora_scale.engine.train_state import ParamState, TrainState

    def forget(state: TrainState) -> TrainState:
        return TrainState({name: ParamState.fresh(entry.value) for name, entry in state.params.items()})

    return lambda change: rebuild(lambda module, state: forget(change(module, state)))


def losses_after(options: argparse.Namespace, seed: int) -> dict[str, list[float]]:
    """The losses of the steps after the event, by variant."""
    from benchmarks.steps import adapt, bare_step
    from tsqlora_scale.config.load import load_config
    from tsqlora_scale.config.schema import ResizeConfig
    from tsqlora_scale.ranks.controller import AdaptiveRanks
    from tsqlora_scale.run.build import build_run
    from tsqlora_scale.run.checkpoint import checkpoint_dir
    from tsqlora_scale.run.preflight import check

    overrides = [
        "sampling.selector=full", "scoring.refresh=none", "train.lr_schedule=constant",
        f"train.max_steps={options.event + options.steps + 1}", "schedule.start=1", "resize.grow_init=gradient",
        f"schedule.end={options.event}", f"schedule.every={options.event}", *options.overrides, f"run.seed={seed}",
        f"run.output_dir={options.out}", f"run.name=seed-{seed}",
        *([f"allocation.policy={ROOT}/benchmarks/policies.py:Doubled"] if options.plan == "double" else []),
    ]  # fmt: skip
    config = load_config(options.config, overrides)
    shutil.rmtree(config.run_dir, ignore_errors=True)
    preflight = check(config)
    run = build_run(preflight)
    while run.step < options.event:
        bare_step(run)
    run.save_checkpoint()
    run.engine.close()
    found = {}
    for name, (grow_init, forgets) in VARIANTS.items():
        run = build_run(preflight, resume=str(checkpoint_dir(config.run_dir / "checkpoints", options.event)))
        resize = ResizeConfig(grow_init=grow_init, shrink=config.resize.shrink)  # type: ignore[arg-type]
        assert isinstance(run.ranks, AdaptiveRanks)
        run.ranks.resize = resize
        if forgets:
            run.engine.rebuild = forgetting(run.engine.rebuild)  # type: ignore[method-assign, assignment]
        adapt(run)
        found[name] = [bare_step(run) for _ in range(options.steps)]
        run.engine.close()
        print(f"seed {seed}, {name}: {statistics.mean(found[name]):.4f}", file=sys.stderr, flush=True)
    return found


def cell(values: list[float], digits: int = 4, sign: str = "") -> str:
    """Mean, standard deviation, and the values."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{spread} ({', '.join(f'{v:{sign}.{digits}f}' for v in values)})"


def main() -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--event", type=int, default=40, help="steps before the event")
    parser.add_argument("--steps", type=int, default=50, help="steps after it")
    parser.add_argument("--plan", choices=("method", "double"), default="method")
    parser.add_argument("overrides", nargs="*", help="section.key=value for all runs")
    options = parser.parse_args()
    means: dict[str, list[float]] = {}
    early: dict[str, list[float]] = {}
    for seed in options.seeds.split(","):
        for name, losses in losses_after(options, int(seed)).items():
            means.setdefault(name, []).append(statistics.mean(losses))
            early.setdefault(name, []).append(statistics.mean(losses[:10]))
    reference = next(iter(VARIANTS))
    print(f"| variant | mean loss of steps 1 to {options.steps} | less that of {reference} | the same, steps 1 to 10 |")
    print("|---|---|---|---|")
    for name, values in means.items():
        less = [v - r for v, r in zip(values, means[reference], strict=True)]
        first = [v - r for v, r in zip(early[name], early[reference], strict=True)]
        print(f"| {name} | {cell(values)} | {cell(less, sign='+')} | {cell(first, sign='+')} |")


if __name__ == "__main__":
    main()
