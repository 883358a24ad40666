#!/usr/bin/env python3
"""Regenerate the packaged extract of the movie review snippets from the original files.

    python benchmarks/make_movie_snippets.py PATH_TO_ORIGINAL [--out FOLDER]

PATH_TO_ORIGINAL is a folder with movieReviewSnippets_GroundTruth.txt, movieReviewSnippets_anonDataRatings.txt and
LICENSE.txt, as the package vaderSentiment 0.5 has them. The result depends on these files alone: the same sentences,
order and split on every machine, and the same bytes with the same zlib.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

TRAIN_ROWS, DEV_ROWS = 6000, 1000
#: Sentences whose mean rating (-4 to 4) lies nearer to 0 are not clearly positive or negative.
CLEAR = 0.5
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "tsqlora_scale" / "data" / "movie_snippets"
HEADER = ("id", "text", "label", "mean", "std")


@dataclass(frozen=True)
class Snippet:
    """One sentence with the mean and the standard deviation of its 15 to 20 ratings."""

    id: str
    text: str
    mean: float
    std: float

    @property
    def label(self) -> str:
        """The sign of the mean rating."""
        return "positive" if self.mean > 0 else "negative"

    @property
    def order(self) -> str:
        """A key that shuffles without a random generator, whose stream could change between versions."""
        return hashlib.sha256(f"movie_snippets {self.id}".encode()).hexdigest()


def read_original(folder: Path) -> list[Snippet]:
    """All sentences of the original, in its order."""
    ratings = {row[0]: row for row in _rows(folder / "movieReviewSnippets_anonDataRatings.txt")}
    snippets = []
    for id, mean, text in _rows(folder / "movieReviewSnippets_GroundTruth.txt"):
        _, rated_mean, std, _ = ratings[id]
        assert abs(float(mean) - float(rated_mean)) < 1e-6, f"id {id}: the two files disagree on the mean"
        snippets.append(Snippet(id, " ".join(text.split()), float(mean), float(std)))
    return snippets


def split(snippets: list[Snippet], train_rows: int, dev_rows: int) -> tuple[list[Snippet], list[Snippet]]:
    """(train, dev): clearly rated sentences, each text once, in the order of a hash of the id."""
    clear = [s for s in snippets if abs(s.mean) > CLEAR]
    once = {s.text.casefold(): s for s in reversed(clear)}.values()  # the first of equal texts stays
    shuffled = sorted(once, key=lambda s: s.order)
    assert len(shuffled) >= train_rows + dev_rows, f"only {len(shuffled)} clearly rated sentences"
    return shuffled[dev_rows : dev_rows + train_rows], shuffled[:dev_rows]


def write_tsv_gz(path: Path, snippets: list[Snippet]) -> None:
    """A gzipped tsv with a header, without a time stamp or a file name in it."""
    lines = ["\t".join(HEADER)]
    lines += [f"{s.id}\t{s.text}\t{s.label}\t{s.mean:.4f}\t{s.std:.4f}" for s in snippets]
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), compresslevel=9, mtime=0))


def write_extract(original: Path, out: Path, *, train_rows: int = TRAIN_ROWS, dev_rows: int = DEV_ROWS) -> None:
    """Write train.tsv.gz, dev.tsv.gz and LICENSE.txt to ``out``."""
    train, dev = split(read_original(original), train_rows, dev_rows)
    out.mkdir(parents=True, exist_ok=True)
    write_tsv_gz(out / "train.tsv.gz", train)
    write_tsv_gz(out / "dev.tsv.gz", dev)
    licence = (original / "LICENSE.txt").read_text(encoding="utf-8")  # universal newlines
    (out / "LICENSE.txt").write_bytes(licence.encode())


def _rows(path: Path) -> list[list[str]]:
    text = path.read_text(encoding="utf-8")
    return [line.split("\t") for line in text.split("\n") if line]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path, help="folder of the original files")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write to (default: the package's)")
    args = parser.parse_args()
    write_extract(args.original, args.out)
    for path in sorted(args.out.glob("*.tsv.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            print(f"{path.name}: {sum(1 for _ in file) - 1} rows, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
