#!/usr/bin/env python3
"""The pools of the studies, remade from a data folder (see corpora.py) for one seed.

    python benchmarks/studies/pools.py --data FOLDER --out DIR --seed S [--pools mixed,length,...]

    DIR/seed-S/NAME/train.jsonl   the pool: id, text, label (summaries: id, source, target)
                    query.jsonl   64 rows of the wanted task, like the pool's, that are not in it
                    tune.jsonl    half of the development set: learning rates and steps are chosen on it
                    test.jsonl    the other half: what is reported
                    truth.jsonl   what nobody knows in life: id, on_target, wrong, copy (of another row), origin
                    meta.json     counts, and the metric

The wanted task is SST-2 (summaries: XSum). Query rows are from its *training* file, so that the development set is
touched by nothing but tuning and reporting; its halves are the same for every seed. All texts of a pool and its query
are distinct.

    mixed      300 SST-2, 600 CoLA, 500 RTE, 600 QNLI: other topics, other tasks
    length     600 SST-2, 1,400 of its sentences labelled by whether they have more words than the median
    noise      600 SST-2, 1,400 of its sentences with random labels
    clean      2,000 SST-2: all on target
    rte        2,000 RTE, its query and halves of RTE: all on target
    flips      1,000 SST-2, 30 % of the labels flipped
    summaries  300 XSum, 600 of its documents with another's summary, 500 RTE, 600 QNLI pairs as text to be written
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from benchmarks.studies.corpora import Corpus, Example, entailed_pairs, read_corpus  # noqa: E402

QUERY_ROWS, FEWEST = 64, 10
#: Pools whose wanted task is not SST-2.
WANTED = {"summaries": "xsum", "rte": "rte"}


@dataclass(frozen=True)
class PoolRow:
    """A row of a pool and the truth about it."""

    example: Example
    origin: str
    on_target: bool = True
    wrong: bool = False
    is_copy: bool = False


@dataclass(frozen=True)
class StudyPool:
    """A pool, in the order in which it is written, with what goes beside it.

    Attributes:
        query: rows of the wanted task; empty where there is none.
        corpus: of the wanted task, whose held-out halves are tuned on and reported.
    """

    name: str
    rows: list[PoolRow]
    query: list[Example]
    corpus: Corpus


class Draw:
    """Examples of a corpus in random order, each given out once."""

    def __init__(self, corpus: Corpus, generator: np.random.Generator) -> None:
        self.corpus = corpus
        self._left = [corpus.train[i] for i in generator.permutation(len(corpus.train)).tolist()]

    def take(self, count: int) -> list[Example]:
        """The next ``count``.

        Raises:
            SystemExit: the corpus has no more.
        """
        if count > len(self._left):
            raise SystemExit(f"{self.corpus.name}: {count} more rows are asked for and {len(self._left)} are left")
        taken, self._left = self._left[:count], self._left[count:]
        return taken


def rows_of(examples: Iterable[Example], origin: str, **truth: bool) -> list[PoolRow]:
    """Rows of one origin."""
    return [PoolRow(example, origin, **truth) for example in examples]


def flipped(rows: Sequence[PoolRow], share: float, generator: np.random.Generator) -> list[PoolRow]:
    """The rows with exactly that share of their labels (two classes) turned."""
    turned = set(generator.permutation(len(rows))[: round(share * len(rows))].tolist())
    return [turn(row) if i in turned else row for i, row in enumerate(rows)]


def turn(row: PoolRow) -> PoolRow:
    """The row with the other of two labels, which is wrong."""
    return replace(row, example=Example(row.example.text, 1 - int(row.example.answer)), wrong=True)


class Maker:
    """Makes pools of one seed.

    Args:
        data: see :mod:`benchmarks.studies.corpora`.
        scale: multiplies all counts.
    """

    def __init__(self, data: Path, seed: int, scale: float = 1.0) -> None:
        self.data, self.seed, self.scale = data, seed, scale

    def count(self, rows: int) -> int:
        """Rows at this scale."""
        return max(round(self.scale * rows), 4)

    def query(self, wanted: Draw) -> list[Example]:
        """Rows of the wanted task; at a small scale as few as the package takes."""
        return wanted.take(max(round(self.scale * QUERY_ROWS), FEWEST))

    def draw(self, name: str, generator: np.random.Generator) -> Draw:
        """Of a corpus."""
        return Draw(read_corpus(self.data, name), generator)

    def make(self, name: str) -> StudyPool:
        """One of :data:`POOLS`: a function of the data, the name, the seed and the scale."""
        generator = np.random.default_rng([self.seed, *name.encode()])
        wanted = self.draw(WANTED.get(name, "sst2"), generator)
        rows = POOLS[name](self, wanted, generator)
        query = self.query(wanted)
        order = generator.permutation(len(rows)).tolist()
        return StudyPool(name, [rows[i] for i in order], query, wanted.corpus)

    def mixed(self, wanted: Draw, generator: np.random.Generator) -> list[PoolRow]:
        """Other topics."""
        rows = rows_of(wanted.take(self.count(300)), "sst2")
        for name, count in (("cola", 600), ("rte", 500), ("qnli", 600)):
            rows += rows_of(self.draw(name, generator).take(self.count(count)), name, on_target=False)
        return rows

    def length(self, wanted: Draw, generator: np.random.Generator) -> list[PoolRow]:
        """The same topic, another task."""
        own, others = wanted.take(self.count(600)), wanted.take(self.count(1400))
        median = float(np.median([len(e.text.split()) for e in [*own, *others]]))
        relabelled = [Example(e.text, int(len(e.text.split()) > median)) for e in others]
        return rows_of(own, "sst2") + rows_of(relabelled, "length", on_target=False)

    def noise(self, wanted: Draw, generator: np.random.Generator) -> list[PoolRow]:
        """The same topic, labels at random: half of them happen to be right."""
        own, others = wanted.take(self.count(600)), wanted.take(self.count(1400))
        labels = generator.integers(0, 2, len(others)).tolist()
        rows = rows_of(own, "sst2")
        for example, label in zip(others, labels, strict=True):
            rows.append(PoolRow(Example(example.text, label), "random", on_target=False, wrong=label != example.answer))
        return rows

    def clean(self, wanted: Draw, generator: np.random.Generator) -> list[PoolRow]:
        """All on target."""
        return rows_of(wanted.take(self.count(2000)), "sst2")

    def rte(self, wanted: Draw, generator: np.random.Generator) -> list[PoolRow]:
        """All on target, another task."""
        return rows_of(wanted.take(self.count(2000)), "rte")

    def flips(self, wanted: Draw, generator: np.random.Generator) -> list[PoolRow]:
        """Wrong labels."""
        return flipped(rows_of(wanted.take(self.count(1000)), "sst2"), 0.3, generator)

    def summaries(self, wanted: Draw, generator: np.random.Generator) -> list[PoolRow]:
        """Texts to be written: another's summary, or another task's text."""
        rows = rows_of(wanted.take(self.count(300)), "xsum")
        others = wanted.take(self.count(600))
        theirs = [*others[1:], others[0]]  # in random order already: everybody gets the next one's
        shuffled = [Example(e.text, other.answer) for e, other in zip(others, theirs, strict=True)]
        rows += rows_of(shuffled, "shuffled", on_target=False, wrong=True)
        for name, count in (("rte", 500), ("qnli", 600)):
            pairs = Draw(Corpus(name, entailed_pairs(self.data, name), []), generator)
            rows += rows_of(pairs.take(self.count(count)), name, on_target=False)
        return rows


#: name -> the rows of a pool, in any order
POOLS: dict[str, Callable[[Maker, Draw, np.random.Generator], list[PoolRow]]] = {
    "mixed": Maker.mixed,
    "length": Maker.length,
    "noise": Maker.noise,
    "clean": Maker.clean,
    "rte": Maker.rte,
    "flips": Maker.flips,
    "summaries": Maker.summaries,
}


def write_pool(folder: Path, pool: StudyPool, seed: int) -> None:
    """The files of a pool; its rows are written in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    tune, test = pool.corpus.halves()
    write_rows(folder / "train.jsonl", [record(f"p{i}", row.example) for i, row in enumerate(pool.rows)])
    for name, letter, examples in (("query", "q", pool.query), ("tune", "u", tune), ("test", "t", test)):
        if examples:
            write_rows(folder / f"{name}.jsonl", [record(f"{letter}{i}", e) for i, e in enumerate(examples)])
    truth = [
        {"id": f"p{i}", "on_target": row.on_target, "wrong": row.wrong, "copy": row.is_copy, "origin": row.origin}
        for i, row in enumerate(pool.rows)
    ]
    write_rows(folder / "truth.jsonl", truth)
    meta = {
        "pool": pool.name,
        "seed": seed,
        "task": "summaries" if isinstance(pool.rows[0].example.answer, str) else "classes",
        "metric": pool.corpus.metric,
        "rows": len(pool.rows),
        "on_target": sum(row.on_target for row in pool.rows),
        "wrong": sum(row.wrong for row in pool.rows),
        "copies": sum(row.is_copy for row in pool.rows),
        "query": len(pool.query),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def record(name: str, example: Example) -> dict[str, Any]:
    """A row as it is written."""
    if isinstance(example.answer, str):
        return {"id": name, "source": example.text, "target": example.answer}
    return {"id": name, "text": example.text, "label": example.answer}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A jsonl file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def main() -> None:
    """Write the pools of the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=lambda text: [int(seed) for seed in text.split(",")], required=True)
    parser.add_argument("--pools", default=",".join(POOLS))
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all counts")
    options = parser.parse_args()
    for seed in options.seed:
        maker = Maker(options.data, seed, options.scale)
        for name in options.pools.split(","):
            write_pool(options.out / f"seed-{seed}" / name, maker.make(name), seed)
            print(options.out / f"seed-{seed}" / name, flush=True)


if __name__ == "__main__":
    main()
