#!/usr/bin/env python3
"""Do the scores find mislabelled samples, and does training on them help?

    python benchmarks/noise.py scores --config FILE --out DIR [--warmup 0,50,200] [section.key=value ...]
    python benchmarks/noise.py train  --config FILE --out DIR [--arm NAME[:key=value;...] ...]

A share of the training labels is replaced by another one, by seed. ``scores`` scores the pool after some warm-up steps
and prints, for each term, the area under the ROC curve with which it tells flipped from clean labels, and the share of
the sampling mass that the flipped ones get. Where the data has a column ``std``, the raters' standard deviation, it
prints the rank correlation of each term with it, too. ``train`` trains every arm with clean and with flipped labels,
with equal steps, and prints the metric on the (clean) development set. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

#: term -> the sign with which a larger value points to a wrong label
TERMS = {"loss": 1, "grad_norm": 1, "delta_loss": 1, "convergence": -1, "quality": -1}
ARMS = [
    "everything:adapter.method=lora",
    *(f"random {keep}:sampling.selector=random;sampling.keep_fraction={keep}" for keep in (0.3, 0.5, 0.7)),
    *(f"ours {keep}:sampling.keep_fraction={keep}" for keep in (0.3, 0.5, 0.7, 1.0)),
    "paper's weights:scoring.preset=paper",
]


def flipped_data(config_path: str, overrides: list[str], out: Path, share: float, seed: int) -> tuple[Path, np.ndarray]:
    """A folder with train.tsv and dev.tsv in which ``share`` of the training labels are wrong, and which (N,) bool."""
    from tsqlora_scale.config.load import load_config
    from tsqlora_scale.tasks import load_data

    config = load_config(config_path, overrides)
    task = config.task
    assert task.label is not None
    data = load_data(task, seed=0)
    generator = np.random.default_rng([seed, 1])
    labels = np.asarray(data.train[task.label])
    flipped = generator.random(len(labels)) < share
    shift = generator.integers(1, task.num_labels, len(labels))
    labels = np.where(flipped, (labels + shift) % task.num_labels, labels)
    folder = out / f"data-{share:g}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    names = task.labels if isinstance(task.labels, list) else [str(i) for i in range(task.num_labels)]
    for split, rows, values in (("train", data.train, labels), ("dev", data.dev, None)):
        assert rows is not None
        values = np.asarray(rows[task.label]) if values is None else values
        spread = rows["std"] if "std" in rows.column_names else [0.0] * len(rows)
        columns = [rows[name] for name in task.text]
        lines = ["\t".join([*task.text, task.label, "spread"])]
        for i, texts in enumerate(zip(*columns, strict=True)):
            lines.append("\t".join([*(" ".join(text.split()) for text in texts), names[values[i]], str(spread[i])]))
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder, flipped


def launch(command: str, config: str, overrides: list[str], out: Path, name: str) -> Path:
    """Run a command of the project unless its result is there; its run folder."""
    folder = out / name
    done = folder / ("result.json" if command == "train" else "scores.json")
    if not done.exists():
        script = str(ROOT / "launch" / f"{command}.py")
        arguments = ["--config", config, "--overwrite", *overrides, f"run.output_dir={out}", f"run.name={name}"]
        subprocess.run([sys.executable, script, *arguments], check=True, stdout=subprocess.DEVNULL)
    return folder


def on_data(folder: Path) -> list[str]:
    """Overrides that read the written data, all of it."""
    values = {"path": folder, "train_file": "train.tsv", "dev_file": "dev.tsv", "max_train_samples": "null"}
    return [f"task.dataset.{key}={value}" for key, value in values.items()] + ["task.dataset.max_dev_samples=null"]


def scores(options: argparse.Namespace) -> None:
    """The table of how well the terms find flipped labels."""
    from scipy.stats import spearmanr
    from sklearn.metrics import roc_auc_score

    from tsqlora_scale.quality import ScoreTable

    print(f"| steps | {' | '.join(TERMS)} | mass on flipped | share | {' | '.join(f'{t} ~ spread' for t in TERMS)} |")
    print("|" + "---|" * (2 * len(TERMS) + 3))
    for warmup in [int(w) for w in options.warmup.split(",")]:
        columns: dict[str, list[float]] = {}
        for seed in options.seeds:
            folder, flipped = flipped_data(options.config, options.overrides, options.out, options.flip, seed)
            overrides = [*options.overrides, *on_data(folder), f"scoring.warmup_steps={warmup}", f"run.seed={seed}"]
            run = launch("score", options.config, overrides, options.out, f"score-{folder.name}-{warmup}-{seed}")
            table, _ = ScoreTable.read(run / "scores")
            spread = np.array(
                [
                    float(line.rsplit("\t", 1)[1])
                    for line in (folder / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
                ]
            )
            for term, sign in TERMS.items():
                columns.setdefault(term, []).append(roc_auc_score(flipped, sign * getattr(table, term)))
                if spread.std() > 0:
                    rank = spearmanr(getattr(table, term)[~flipped], spread[~flipped]).statistic
                    columns.setdefault(f"{term} ~ spread", []).append(rank)
            columns.setdefault("mass", []).append(table.probability[flipped].sum())
            columns.setdefault("share", []).append(flipped.mean())
        order = [*TERMS, "mass", "share", *(f"{term} ~ spread" for term in TERMS)]
        print(f"| {warmup} | {' | '.join(cell(columns.get(name, [])) for name in order)} |", flush=True)


def train(options: argparse.Namespace) -> None:
    """The table of metrics of all arms."""
    print("| arm | clean labels | flipped labels |\n|---|---|---|")
    for arm in options.arm or ARMS:
        name, _, keys = arm.partition(":")
        cells = []
        for share in (0.0, options.flip):
            values = []
            for seed in options.seeds:
                folder, _ = flipped_data(options.config, options.overrides, options.out, share, seed)
                overrides = [
                    *options.overrides,
                    *on_data(folder),
                    *(keys.split(";") if keys else []),
                    f"run.seed={seed}",
                ]
                place = f"{name.replace(' ', '-')}-{share:g}-{seed}"
                result: dict[str, Any] = json.loads(
                    (launch("train", options.config, overrides, options.out, place) / "result.json").read_text(
                        encoding="utf-8"
                    )
                )
                values.append(next(iter(result["metrics"].values())))
            cells.append(cell(values))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scores", "train"])
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--flip", type=float, default=0.2)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--warmup", default="0,50,200")
    parser.add_argument("--arm", action="append", metavar="NAME[:key=value;key=value]")
    parser.add_argument("overrides", nargs="*", help="section.key=value for all runs")
    options = parser.parse_intermixed_args()
    {"scores": scores, "train": train}[options.what](options)


if __name__ == "__main__":
    main()
