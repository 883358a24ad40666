#!/usr/bin/env python3
"""Texts as tokens on disk: memory that does not grow with the pool, and rows a second with several processes.

    python benchmarks/tokens.py --out DIR --sizes 1e5,1e6 --workers 1,2

Writes a file of random words, so many rows of about a kilobyte, and takes the way of a run: the file is converted into
the Arrow cache and checked, tokenized into a cache of tokens, opened once more, and read at random. Memory is the
largest growth of what belongs to no file, looked at a hundred times a second, of the process and, apart, of those that
it has started. Every size and number of processes has a process and a cache of its own. On a machine that others use
only the memory counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.sampler import anonymous_bytes  # noqa: E402
from benchmarks.watch import Watch  # noqa: E402
from tsqlora_scale.common.random_streams import philox  # noqa: E402
from tsqlora_scale.config.schema import TaskConfig  # noqa: E402
from tsqlora_scale.tasks import build_task, load_data, with_tokens  # noqa: E402
from tsqlora_scale.tasks.tokens.token_cache import TokenCache  # noqa: E402
from tsqlora_scale.tasks.tokens.tokenizing_processes import Tokenizing  # noqa: E402

STEPS = ("read", "tokenize", "open", "random rows")
#: Rows that are written at once, words that there are, and the first words of a row, which are its question.
CHUNK, WORDS, QUESTION = 10_000, 5_000, 40


def some_words() -> np.ndarray:
    """Words of two to nine letters."""
    generator = philox(0, "benchmark", 0)
    letters = np.array(list("etaoinshrdlucmfwyp"))
    lengths = generator.integers(2, 10, WORDS)
    return np.array(["".join(letters[generator.integers(0, len(letters), length)]) for length in lengths])


def write_rows(path: Path, size: int, words: int) -> None:
    """A file of ``size`` questions and answers, of as many words together."""
    known = some_words()
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, size, CHUNK):
            rows = known[philox(0, "benchmark", 1 + start).integers(0, WORDS, (min(CHUNK, size - start), words))]
            for row in rows:
                texts = {"source": " ".join(row[:QUESTION]), "target": " ".join(row[QUESTION:])}
                file.write(json.dumps(texts) + "\n")


def tokenizer_of(words: np.ndarray, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte pairs of such words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False
    )
    made.train_from_iterator([" ".join(words)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


class Peaks(Watch):
    """The largest anonymous memory of this process, and of all that it has started together, while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.others = anonymous_bytes(), 0

    def look(self) -> None:
        """At both."""
        self.own = max(self.own, anonymous_bytes())
        found = [name for task in Path("/proc/self/task").iterdir() for name in _read(task / "children").split()]
        self.others = max(self.others, sum(_anonymous(Path("/proc") / name / "status") for name in found))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # it has just ended
        return ""


def _anonymous(status: Path) -> int:
    lines = (line for line in _read(status).splitlines() if line.startswith("RssAnon"))
    return sum(int(line.split()[1]) * 1024 for line in lines)


def measure(file: Path, folder: Path, *, workers: int, length: int, vocabulary: int) -> dict[str, float]:
    """Seconds of the steps, rows a second, and the peaks."""
    datasets.config.HF_DATASETS_CACHE = folder / "arrow"
    cfg = TaskConfig.model_validate(
        {"type": "causal", "source": "source", "target": "target", "dataset": {"train_file": str(file)},
         "metrics": ["loss"], "max_length": length, "max_target_length": length // 2}
    )  # fmt: skip
    tokenizer, model_config = tokenizer_of(some_words(), vocabulary), LlamaConfig(vocab_size=vocabulary)
    found: dict[str, float] = {}

    def timed(name: str, step: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = step()
        found[name] = time.perf_counter() - start
        return result

    before = anonymous_bytes()
    with Peaks() as peaks:
        data = timed("read", lambda: with_tokens(cfg, load_data(cfg, seed=0), tokenizer))
        task = build_task(cfg, data, tokenizer, model_config)
        view, columns = task.read_rows("train"), task.kept_tokens.columns or []
        cache = TokenCache(folder / "tokens", workers, str(folder / "tokens"))
        tokenizing = Tokenizing(cfg, tokenizer, model_config, length)
        timed("tokenize", lambda: cache.store(view, columns, tokenizing))
        task.kept_tokens.keep("train", view, length, timed("open", lambda: cache.store(view, columns, tokenizing)))
        rows = philox(0, "benchmark", 0).integers(0, len(task), (100, 64))
        timed("random rows", lambda: [task.batch(drawn) for drawn in rows])
    tokens = sum(path.stat().st_size for path in (folder / "tokens").rglob("*") if path.is_file())
    sizes = {"memory MB": (peaks.own - before) / 1e6, "others' MB": peaks.others / 1e6, "tokens MB": tokens / 1e6}
    return {**found, "rows/s": len(task) / found["tokenize"], **sizes}


def main() -> None:
    """Measure every size with every number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder on a disk with 4 KB of room per row")
    parser.add_argument("--sizes", default="1e5,1e6")
    parser.add_argument("--workers", default="1,2", help="numbers of processes that tokenize")
    parser.add_argument("--words", type=int, default=155, help="of a row; 155 are about a kilobyte")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row, at most")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("length", "vocabulary")}
    if options.one:
        print(json.dumps(measure(options.one, options.out, workers=int(options.workers), **sizes)))
        return
    names = [*STEPS, "rows/s", "memory MB", "others' MB", "tokens MB"]
    print(f"| rows | KB | processes | {' | '.join(names)} |")
    print("|" + "---|" * (len(names) + 3))
    options.out.mkdir(parents=True, exist_ok=True)
    for size in [float(text) for text in options.sizes.split(",")]:
        file = options.out / f"rows-{size:.0e}.jsonl"
        write_rows(file, int(size), options.words)
        try:
            for workers in options.workers.split(","):
                folder = options.out / f"cache-{size:.0e}-{workers}"
                command = [sys.executable, __file__, "--out", str(folder), "--one", str(file), "--workers", workers]
                command += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
                try:
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                found, mean = json.loads(done.stdout), file.stat().st_size / size / 1e3
                print(
                    f"| {size:.0e} | {mean:.2f} | {workers} | {' | '.join(f'{found[n]:.3g}' for n in names)} |",
                    flush=True,
                )
        finally:
            file.unlink()


if __name__ == "__main__":
    main()
