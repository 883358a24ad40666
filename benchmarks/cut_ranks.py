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
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from tsqlora_scale.common.quiet import prepare_environment  # noqa: E402
from tsqlora_scale.comparison.estimates import mean_of  # noqa: E402

Cut = Literal["uniform", "total"]
WAYS: tuple[Cut, ...] = ("uniform", "total")


def reported(arm: Path) -> dict[int, Path]:
    """By seed, the folders of an arm's finished runs but for those of tuning and pilots.

    Raises:
        SystemExit: there are two of a seed.
    """
    found: dict[int, Path] = {}
    for result in sorted(arm.glob("*/result.json")):
        run = result.parent
        if run.name.startswith(("tuning-", "pilot-")):
            continue
        seed = int(run.name.rpartition("seed")[2])
        if seed in found:
            raise SystemExit(f"{run} and {found[seed].name} are of one seed; remove the one that is not reported")
        found[seed] = run
    return found


def result_of(run: Path) -> dict[str, Any]:
    """What a run came to."""
    loaded: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return loaded


def cuts_of(run: Path, ranks: Sequence[int]) -> dict[tuple[int | None, Cut], dict[str, Any]]:
    """The rows of ``launch/export.py --ranks``, by rank and way; rank None is the adapter as it is."""
    from tsqlora_scale import load_config
    from tsqlora_scale.run.exporter import truncate

    found: dict[tuple[int | None, Cut], dict[str, Any]] = {}
    for by in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            rows = truncate(run, ranks, Path(folder) / "cut", by=by, config=load_config(run / "config.yaml"))
        found |= {(row["rank"], by): row for row in rows}
    return found


def line(name: str, parameters: float, values: Sequence[float], others: Sequence[float] | None, lost: str) -> str:
    """A row of the table."""
    mean = mean_of(values)
    cells = [name, f"{parameters:,.0f}", f"{mean.value:.4f} [{mean.low:.4f}, {mean.high:.4f}]", "-"]
    if others is not None:
        gap = mean_of([value - other for value, other in zip(values, others, strict=True)])
        cells[3] = f"{gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
    return "| " + " | ".join([*cells, lost]) + " |"


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
    cuts = {seed: cuts_of(runs[options.arm][seed], options.ranks) for seed in seeds}
    metric = next(iter(result_of(runs[options.arm][seeds[0]])["metrics"]))

    def trained(name: str) -> list[float]:
        return [result_of(runs[name][seed])["metrics"][metric] for seed in seeds]

    named = f"{options.task}, seeds {', '.join(map(str, seeds))}"
    print(f"| {named} | factors' parameters | {metric} | less trained | lost |")
    print("|" + "---|" * 5)
    whole = [cuts[seed][None, "uniform"] for seed in seeds]
    head = result_of(runs[options.arm][seeds[0]])["trainable_parameters"] - whole[0]["parameters"]  # a LoRA arm's

    def size(name: str) -> float:
        return float(sum(result_of(runs[name][seed])["trainable_parameters"] - head for seed in seeds)) / len(seeds)

    print(line(options.arm, whole[0]["parameters"], [row["metrics"][metric] for row in whole], None, "0"))
    for place, rank in enumerate(options.ranks):
        others = trained(options.against[place]) if place < len(options.against) else None
        for by in WAYS:
            rows = [cuts[seed][rank, by] for seed in seeds]
            parameters = sum(row["parameters"] for row in rows) / len(rows)
            lost = f"{sum(row['error'] for row in rows) / len(rows):.2f}"
            print(line(f"cut to {rank}, {by}", parameters, [row["metrics"][metric] for row in rows], others, lost))
        if others is not None:
            print(line(f"{options.against[place]}, trained", size(options.against[place]), others, None, "-"))


if __name__ == "__main__":
    main()
