"""The rows that studies are made from: a folder of SST-2, CoLA, RTE, QNLI, XSum and movie_snippets.

Expected below the folder: ``SST-2/{train,dev}.tsv`` (sentence, label), ``CoLA/{train,dev}.tsv`` (no header; source,
label, note, sentence), ``RTE/{train,dev}.tsv`` (index, sentence1, sentence2, label), ``QNLI/train9k.jsonl`` and
``QNLI/heldout1k.jsonl`` (sentence1, sentence2, label), ``XSum/{train,dev}.jsonl`` (document, summary) and
``movie_snippets/movieReviewSnippets_GroundTruth.txt`` (id, mean rating, sentence).

Pairs are one text, first and second with a blank between them, so that rows of every task share one column and nothing
in a row's form but its words says where it is from. An entailment is label 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

#: Rows of a half of a held-out set at most.
HALF = 436
#: The seed of everything that must be the same for all seeds of a study: what is tuned on and what is reported.
FIXED = 20_240_917
#: Sentences whose mean rating (-4 to 4) is nearer to 0 are neither positive nor negative.
NEUTRAL = 0.5


@dataclass(frozen=True)
class Example:
    """A text and its answer: a class, or the text that is to be written."""

    text: str
    answer: int | str


@dataclass(frozen=True)
class Corpus:
    """A task's rows.

    Attributes:
        train: distinct texts, none of them among the held-out.
        dev: held-out rows.
        metric: the task's usual one.
    """

    name: str
    train: list[Example]
    dev: list[Example]
    metric: str = "accuracy"

    def halves(self) -> tuple[list[Example], list[Example]]:
        """Held-out rows to tune on and others to report; the same for every seed, so that no row is ever both."""
        order = np.random.default_rng(FIXED).permutation(len(self.dev)).tolist()
        size = min(HALF, len(order) // 2)
        return [self.dev[i] for i in order[:size]], [self.dev[i] for i in order[size : 2 * size]]


def read_corpus(folder: Path, name: str) -> Corpus:
    """One of :data:`READERS`, read once.

    Raises:
        OSError: a file is not there.
    """
    return _read(folder.resolve(), name)


@cache
def _read(folder: Path, name: str) -> Corpus:
    reader, metric = READERS[name]
    train, dev = reader(folder)
    dev = _distinct(dev)
    seen = {example.text for example in dev}
    return Corpus(name, [e for e in _distinct(train) if e.text not in seen], dev, metric)


def _distinct(examples: Iterable[Example]) -> list[Example]:
    """Those with a text, each text once: the first."""
    return list({e.text: e for e in reversed([e for e in examples if e.text])}.values())[::-1]


def _lines(path: Path, *, header: bool) -> list[list[str]]:
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line]
    return rows[1:] if header else rows


def _records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _plain(*texts: str) -> str:
    return " ".join(" ".join(texts).split())


def _sst2(folder: Path) -> tuple[list[Example], list[Example]]:
    train, dev = (
        [Example(_plain(text), int(label)) for text, label in _lines(folder / f"SST-2/{split}.tsv", header=True)]
        for split in ("train", "dev")
    )
    return train, dev


def _cola(folder: Path) -> tuple[list[Example], list[Example]]:
    train, dev = (
        [Example(_plain(row[3]), int(row[1])) for row in _lines(folder / f"CoLA/{split}.tsv", header=False)]
        for split in ("train", "dev")
    )
    return train, dev


def _rte(folder: Path) -> tuple[list[Example], list[Example]]:
    train, dev = (
        [
            Example(_plain(row[1], row[2]), int(row[3] == "entailment"))
            for row in _lines(folder / f"RTE/{split}.tsv", header=True)
        ]
        for split in ("train", "dev")
    )
    return train, dev


def _qnli(folder: Path) -> tuple[list[Example], list[Example]]:
    train, dev = (
        [
            Example(_plain(row["sentence1"], row["sentence2"]), int(row["label"] == "entailment"))
            for row in _records(folder / f"QNLI/{split}.jsonl")
        ]
        for split in ("train9k", "heldout1k")
    )
    return train, dev


def _movies(folder: Path) -> tuple[list[Example], list[Example]]:
    rows = _lines(folder / "movie_snippets/movieReviewSnippets_GroundTruth.txt", header=False)
    rated = [(float(mean), _plain(text)) for _, mean, text in rows]
    clear = [Example(text, int(mean > 0)) for mean, text in rated if abs(mean) >= NEUTRAL]
    order = np.random.default_rng(FIXED).permutation(len(clear)).tolist()
    held_out = set(order[: min(2 * HALF, len(order) // 4)])
    train = [e for i, e in enumerate(clear) if i not in held_out]
    return train, [e for i, e in enumerate(clear) if i in held_out]


def _xsum(folder: Path) -> tuple[list[Example], list[Example]]:
    train, dev = (
        [
            Example(" ".join(row["document"].split()[:200]), _plain(row["summary"]))
            for row in _records(folder / f"XSum/{split}.jsonl")
        ]
        for split in ("train", "dev")
    )
    return train, dev


#: name -> how its training and held-out rows are read, and its metric
READERS: dict[str, tuple[Callable[[Path], tuple[list[Example], list[Example]]], str]] = {
    "sst2": (_sst2, "accuracy"),
    "cola": (_cola, "matthews_correlation"),
    "rte": (_rte, "accuracy"),
    "qnli": (_qnli, "accuracy"),
    "movies": (_movies, "accuracy"),
    "xsum": (_xsum, "loss"),
}


def entailed_pairs(folder: Path, name: str) -> list[Example]:
    """RTE's or QNLI's pairs as texts to be written: the second sentence after the first, entailed or not."""
    if name == "rte":
        pairs = [(row[1], row[2]) for row in _lines(folder / "RTE/train.tsv", header=True)]
    else:
        pairs = [(row["sentence2"], row["sentence1"]) for row in _records(folder / "QNLI/train9k.jsonl")]
    return _distinct(Example(_plain(first), _plain(second)) for first, second in pairs)
