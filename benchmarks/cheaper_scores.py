#!/usr/bin/env python3
"""What cheaper scoring changes: its rank correlation (Spearman) with the full pass, and its time.

    python benchmarks/cheaper_scores.py --config FILE --out DIR [--variant NAME:key=value[;key=value ...] ...]

Every variant scores the pool of the config (a classification task) with ``launch/score.py``, after as many warm-up
steps. ``model.name_or_path`` is what ``scoring.proxy_model`` would be. Samples that a variant does not score are left
out of its correlation; their share is printed. "Another seed" is how far two full passes differ anyway. Finished passes
are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.noise import flipped_data, launch, on_data  # noqa: E402

TERMS = ("grad_norm", "delta_loss", "convergence", "quality")
VARIANTS = [
    "another seed:run.seed=1",
    "first order:scoring.delta_loss=first_order",
    "half the length:scoring.max_length=24",
    "a quarter of the samples:scoring.max_samples=1000",
]


def main() -> None:
    """Score, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", action="append", metavar="NAME:key=value;...")
    parser.add_argument("overrides", nargs="*", help="section.key=value for all passes, the full one too")
    options = parser.parse_intermixed_args()
    from scipy.stats import spearmanr

    from tsqlora_scale.quality import ScoreTable

    print(f"| pass | scored | {' | '.join(TERMS)} | common with the best 30 % | warm-up s | scoring s |")
    print("|" + "---|" * (len(TERMS) + 5))
    folder, _ = flipped_data(options.config, options.overrides, options.out, 0.0, 0)  # the pool that every seed scores
    full: ScoreTable | None = None
    for variant in ["full:", *(options.variant or VARIANTS)]:
        name, _, keys = variant.partition(":")
        overrides = [*options.overrides, *on_data(folder), *(keys.split(";") if keys else [])]
        run = launch("score", options.config, overrides, options.out, name.replace(" ", "-"))
        table, _ = ScoreTable.read(run / "scores")
        full = full or table
        scored = table.scoring_pass >= 0
        cells = [f"{spearmanr(getattr(table, t)[scored], getattr(full, t)[scored]).statistic:.3f}" for t in TERMS]
        best = [set(np.argsort(-t.quality[scored])[: int(0.3 * scored.sum())]) for t in (table, full)]
        cells.append(f"{len(best[0] & best[1]) / max(len(best[0]), 1):.2f}")
        seconds = json.loads((run / "scores.json").read_text(encoding="utf-8"))["seconds"]
        cells += [f"{seconds.get(phase, 0.0):.0f}" for phase in ("warmup", "scoring")]
        print(f"| {name} | {scored.mean():.0%} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
