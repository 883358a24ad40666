"""A folder of data as studies read it, small enough to be looked at."""

from __future__ import annotations

import json
from pathlib import Path


def write_small_data(folder: Path, rows: int = 60) -> Path:
    """Every corpus with ``rows`` training rows and 24 held-out ones; one text of SST-2 is in both, another twice."""
    for name in ("SST-2", "CoLA", "RTE", "QNLI", "XSum", "movie_snippets"):
        (folder / name).mkdir(parents=True)
    entailed = ("not_entailment", "entailment")
    for split, count in (("train", rows), ("dev", 24)):
        words = [f"{split} {i}" for i in range(count)]
        sst2 = [f"film {word} \t{i % 2}" for i, word in enumerate(words)]
        if split == "train":
            sst2 += ["film dev 3 \t1", sst2[0]]
        _write(folder / f"SST-2/{split}.tsv", ["sentence\tlabel", *sst2])
        _write(folder / f"CoLA/{split}.tsv", [f"src\t{i % 2}\t\tgrammar {word}" for i, word in enumerate(words)])
        pairs = [(f"premise {word}", f"claim {word}", entailed[i % 2]) for i, word in enumerate(words)]
        lines = [f"{i}\t{a}\t{b}\t{label}" for i, (a, b, label) in enumerate(pairs)]
        _write(folder / f"RTE/{split}.tsv", ["index\tsentence1\tsentence2\tlabel", *lines])
        asked = [{"sentence1": f"why {a}", "sentence2": b, "label": label} for a, b, label in pairs]
        place = {"train": "train9k", "dev": "heldout1k"}[split]
        _write(folder / f"QNLI/{place}.jsonl", [json.dumps(row) for row in asked])
        told = [{"document": f"news {word}\nmore", "summary": f"short {word}"} for word in words]
        _write(folder / f"XSum/{split}.jsonl", [json.dumps(row) for row in told])
    rated = [f"{i}\t{(i % 7) - 3}.0\tsnippet {i}" for i in range(2 * rows)]
    _write(folder / "movie_snippets/movieReviewSnippets_GroundTruth.txt", rated)
    return folder


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
