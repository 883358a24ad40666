#!/usr/bin/env python3
"""What cutting ranks after training comes to, beside training at those ranks.

    python benchmarks/cut_ranks.py OUT --task TASK --arm ARM --ranks 4,2 [--against ARM,ARM]

``OUT`` is what ``launch/compare.py`` wrote. The adapter of every reported run of ``--arm`` is cut, each layer to a rank
(``uniform``) and all layers to as many ranks on average (``total``), and measured on the run's own held-out rows, as
the run was. ``--against`` names the arms that were trained at those ranks, in their order. Differences are paired by
seed, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from tsqlora_scale.common.quiet import prepare_environment  # noqa: E402
from tsqlora_scale.comparison.comparison_tables import with_interval  # noqa: E402
from tsqlora_scale.comparison.estimates import mean_of  # noqa: E402
from tsqlora_scale.comparison.run_folder import FinishedRun, read_run  # noqa: E402

WAYS = ("uniform", "total")


def reported(arm: Path) -> dict[int, FinishedRun]:
    """By seed, an arm's finished runs but for those of tuning and pilots.

    Raises:
        SystemExit: there are two of a seed.
    """
    found: dict[int, FinishedRun] = {}
    for result in sorted(arm.glob("*/result.json")):
        run = read_run(result.parent)
        if run.folder.name.startswith(("tuning-", "pilot-")):
            continue
        if (other := found.setdefault(run.result["seed"], run)) is not run:
            raise SystemExit(f"{run.folder} and {other.folder.name} are of one seed; remove what is not reported")
    return found


def cuts_of(run: Path, ranks: Sequence[int]) -> dict[tuple[int | None, str], dict[str, Any]]:
    """The rows of ``launch/export.py --ranks``, by rank and way; rank None is the adapter as it is."""
    from tsqlora_scale import load_config
    from tsqlora_scale.run.exporter import truncate

    found: dict[tuple[int | None, str], dict[str, Any]] = {}
    for by in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            rows = truncate(run, ranks, Path(folder) / "cut", by=by, config=load_config(run / "config.yaml"))  # type: ignore[arg-type]
        found |= {(row["rank"], by): row for row in rows}
    return found


def line(name: str, parameters: float, values: Sequence[float], others: Sequence[float] | None, lost: str) -> str:
    """A row of the table."""
    gap = "-"
    if others is not None:
        gap = with_interval(mean_of([value - other for value, other in zip(values, others, strict=True)]), "+.4f")
    return "| " + " | ".join([name, f"{parameters:,.0f}", with_interval(mean_of(values)), gap, lost]) + " |"


def main() -> None:
    """Cut, measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--arm", required=True)
    parser.add_argument("--ranks", type=lambda text: [int(part) for part in text.split(",")], required=True)
    parser.add_argument("--against", type=lambda text: text.split(","), default=[])
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    prepare_environment()
    if len(options.against) > len(options.ranks):
        raise SystemExit(f"--against names {len(options.against)} arms for {len(options.ranks)} ranks")
    runs = {name: reported(options.out / "runs" / options.task / name) for name in [options.arm, *options.against]}
    seeds = sorted(set.intersection(*(set(found) for found in runs.values())))
    if not seeds:
        raise SystemExit(f"{options.out}: {', '.join(runs)} have no seed in common that is finished")
    cuts = {seed: cuts_of(runs[options.arm][seed].folder, options.ranks) for seed in seeds}
    whole = [cuts[seed][None, "uniform"] for seed in seeds]
    results = {name: [found[seed].result for seed in seeds] for name, found in runs.items()}
    metric = next(iter(results[options.arm][0]["metrics"]))
    head = results[options.arm][0]["trainable_parameters"] - whole[0]["parameters"]  # a LoRA arm's

    named = f"{options.task}, seeds {', '.join(map(str, seeds))}"
    print(f"| {named} | factors' parameters | {metric} | less trained | lost |")
    print("|" + "---|" * 5)
    print(line(options.arm, whole[0]["parameters"], [row["metrics"][metric] for row in whole], None, "0"))
    for rank, name in itertools.zip_longest(options.ranks, options.against):
        others = None if name is None else [result["metrics"][metric] for result in results[name]]
        for by in WAYS:
            rows = [cuts[seed][rank, by] for seed in seeds]
            values, lost = [row["metrics"][metric] for row in rows], mean(row["error"] for row in rows)
            print(line(f"cut to {rank}, {by}", mean(row["parameters"] for row in rows), values, others, f"{lost:.2f}"))
        if others is not None:
            parameters = mean(result["trainable_parameters"] for result in results[name]) - head
            print(line(f"{name}, trained", parameters, others, None, "-"))


if __name__ == "__main__":
    main()
