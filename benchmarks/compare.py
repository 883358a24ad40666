#!/usr/bin/env python3
"""Train variants of one config over several seeds, one after another, and print a table of the final metrics.

    python benchmarks/compare.py --config FILE --seeds 0,1,2 --out DIR \\
        --variant tsqlora --variant lora:adapter.method=lora [section.key=value ...]

Every variant gets the same steps, batch and seeds. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

LAUNCH = Path(__file__).resolve().parents[1] / "launch" / "train.py"


def run(config: str, overrides: list[str], out: Path, name: str, seed: int) -> dict[str, Any]:
    """Train once, unless the result is there already."""
    result = out / name / "result.json"
    if not result.exists():
        command = [sys.executable, str(LAUNCH), "--config", config, "--overwrite", *overrides]
        command += [f"run.output_dir={out}", f"run.name={name}", f"run.seed={seed}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    loaded: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return loaded


def main() -> None:
    """Run all variants and print mean and standard deviation over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", action="append", required=True, metavar="NAME[:key=value;key=value]")
    parser.add_argument("overrides", nargs="*", help="section.key=value for all variants")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:  # seeds outermost: a table of few seeds is fair, a table of few variants is not
        for variant in options.variant:
            name, _, keys = variant.partition(":")
            overrides = [*options.overrides, *(keys.split(";") if keys else [])]
            results.setdefault(name, []).append(run(options.config, overrides, options.out, f"{name}-{seed}", seed))
    print(
        f"| variant | {' | '.join(results[next(iter(results))][0]['metrics'])} | trainable | stepping s | scoring s |"
    )
    print("|---|" + "---|" * (len(results[next(iter(results))][0]["metrics"]) + 3))
    for name, runs in results.items():
        cells = []
        for metric in runs[0]["metrics"]:
            values = [one["metrics"][metric] for one in runs]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread} ({', '.join(f'{v:.4f}' for v in values)})")
        seconds = [one["seconds"] for one in runs]
        stepping = statistics.median(s.get("training", 0) + s.get("warmup", 0) for s in seconds)
        scoring = statistics.median(s.get("scoring", 0) for s in seconds)
        parameters = statistics.mean(one["trainable_parameters"] for one in runs)
        print(f"| {name} | {' | '.join(cells)} | {parameters:,.0f} | {stepping:.0f} | {scoring:.0f} |")


if __name__ == "__main__":
    main()
