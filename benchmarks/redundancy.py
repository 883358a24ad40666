#!/usr/bin/env python3
"""What ``sampling.redundancy`` does to a pool in which some samples occur many times.

    python benchmarks/redundancy.py --config FILE --out DIR [--share 0.1] [--copies 5] [section.key=value ...]

A share of the samples is written ``copies`` times. For each power of the redundancy: the share of the draws that go to
those samples beside what it would be if each counted once, the effective number of samples, and the metric on the
development set after training. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.noise import cell, flipped_data, launch, on_data  # noqa: E402


def with_copies(clean: Path, share: float, copies: int, seed: int) -> tuple[Path, np.ndarray, float]:
    """A folder like ``clean`` with repeated samples; which rows (N,) are of a repeated one; their share, each once."""
    lines = (clean / "train.tsv").read_text(encoding="utf-8").splitlines()
    generator = np.random.default_rng([seed, 2])
    repeated = generator.random(len(lines) - 1) < share
    rows = np.repeat(np.arange(len(repeated)), np.where(repeated, copies, 1))
    generator.shuffle(rows)
    folder = clean.parent / f"{clean.name}-{share:g}x{copies}"
    folder.mkdir(exist_ok=True)
    (folder / "train.tsv").write_text("\n".join([lines[0], *(lines[1 + row] for row in rows)]) + "\n", encoding="utf-8")
    (folder / "dev.tsv").write_text((clean / "dev.tsv").read_text(encoding="utf-8"), encoding="utf-8")
    return folder, repeated[rows], float(repeated.mean())


def main() -> None:
    """Train with every power, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--copies", type=int, default=5)
    parser.add_argument(
        "--power", type=lambda text: [float(power) for power in text.split(",")], default=[0.0, 0.5, 1.0]
    )
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="section.key=value for all runs")
    options = parser.parse_intermixed_args()
    from tsqlora_scale.quality import ScoreTable

    print("| power | draws of repeated samples | rows | each once | effective samples | metric | scoring s |")
    print("|" + "---|" * 7)
    for power in options.power:
        columns: dict[str, list[float]] = {}
        for seed in options.seeds:
            clean, _ = flipped_data(options.config, options.overrides, options.out, 0.0, seed)
            folder, repeated, once = with_copies(clean, options.share, options.copies, seed)
            keys = [*options.overrides, *on_data(folder), f"sampling.redundancy={power:g}", f"run.seed={seed}"]
            run = launch("train", options.config, keys, options.out, f"power-{power:g}-{seed}")
            result = json.loads((run / "result.json").read_text(encoding="utf-8"))
            table, _ = ScoreTable.read(run / "scores")
            values = {
                "draws": table.probability[repeated].sum(),
                "rows": repeated.mean(),
                "once": once,
                "effective": table.effective_sample_size(),
                "metric": next(iter(result["metrics"].values())),
                "seconds": result["seconds"]["scoring"],
            }
            for name, value in values.items():
                columns.setdefault(name, []).append(float(value))
        print(f"| {power:g} | {' | '.join(cell(values) for values in columns.values())} |", flush=True)


if __name__ == "__main__":
    main()
