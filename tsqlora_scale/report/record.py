"""The run folder: config, one line per step and per event, the final result. Rank 0 writes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tsqlora_scale.common.code_version import SOURCE, UNKNOWN
from tsqlora_scale.common.files import written_whole
from tsqlora_scale.report.peak_memory import PeakMemory

log = logging.getLogger("tsqlora_scale")

#: All that a run writes; what another start would go on from comes first, so that no half of a run is left behind it.
CONTENTS = (
    "checkpoints",
    "config.yaml",
    "metrics.jsonl",
    "ranks.jsonl",
    "scores",
    "scores.json",
    "score-parts",
    "audit",
    "adapter",
    "result.json",
)


class RunRecord:
    """Appends to ``metrics.jsonl`` and ``ranks.jsonl``, writes ``result.json``; times the phases of a run.

    A context manager: at its end, of whatever kind, the lines that wait for room are written or said to be lost.

    Args:
        folder: the run folder.
        writes: whether this process writes (rank 0).
        device: whose memory the phases' peaks are of.

    Attributes:
        seconds: wall seconds by phase.
        memory: peaks by phase.
        code: digest of the code that runs.
        earlier_code: digests of other code that has worked on the run, or on one before it.
    """

    def __init__(self, folder: Path, *, writes: bool, device: torch.device | None = None) -> None:
        self.folder = folder
        self._writes = writes
        self.seconds: dict[str, float] = defaultdict(float)
        self.memory = PeakMemory(device)
        self.code = SOURCE
        self.earlier_code: list[str] = []
        self._waiting: dict[str, list[str]] = defaultdict(list)
        #: Files whose lines wait, as has been said.
        self._full: set[str] = set()

    def note_code(self, digests: Iterable[str]) -> None:
        """Remember code that has worked on the run, or on one before it."""
        self.earlier_code += [each for each in digests if each not in (*self.earlier_code, self.code)]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with: seconds by phase, and all code that has worked on it."""
        return {"seconds": dict(self.seconds), "code": [*self.earlier_code, self.code]}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; one of an earlier version does not say by which code it was written."""
        self.seconds.update(tree["seconds"])
        self.note_code(tree.get("code", [UNKNOWN]))

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        for name, waiting in self._waiting.items():
            if waiting:
                log.warning("%d lines of %s are lost", len(waiting), self.folder / name)

    def flush(self) -> None:
        """Write the lines that wait, if there is room for them now."""
        for name, waiting in self._waiting.items():
            if waiting:
                self._write_waiting(name)

    def prepare(self, config_yaml: str) -> None:
        """Start a run: drop what an earlier one left here, and write the resolved config."""
        if self._writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in CONTENTS:
                path = self.folder / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            (self.folder / "config.yaml").write_text(config_yaml, encoding="utf-8")

    def change_config(self, config_yaml: str) -> None:
        """Go on, perhaps by another config: it takes the old one's place, and the result of what was goes."""
        if self._writes:
            (self.folder / "result.json").unlink(missing_ok=True)  # first: it is of the config that was
            with written_whole(self.folder / "config.yaml") as partial:
                partial.write_text(config_yaml, encoding="utf-8")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count wall seconds, and the peak of memory, under a phase: load, warmup, scoring, training, resizing,
        evaluation, checkpointing."""
        start = time.perf_counter()
        try:
            with self.memory.phase(name):
                yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def metrics(self, **line: Any) -> None:
        """A line of ``metrics.jsonl``."""
        self._append("metrics.jsonl", line)

    def event(self, **line: Any) -> None:
        """A line of ``ranks.jsonl``."""
        self._append("ranks.jsonl", line)

    def rewind(self, step: int, *, last_step: int | None = None) -> None:
        """Drop what a resumed run writes again: the lines after ``step``, and the evaluation after ``last_step``."""
        if not self._writes:
            return
        for name in ("metrics.jsonl", "ranks.jsonl"):
            path = self.folder / name
            if path.exists():
                found = [(text, _parsed(text)) for text in path.read_text(encoding="utf-8").splitlines()]
                lines = [
                    text
                    for text, line in found
                    if line is not None
                    and line["step"] <= step
                    and not (line["step"] == last_step and "eval" in line)
                    and not (line["step"] == step and "eval_average" in line)  # which the end writes
                ]
                with written_whole(path) as partial:
                    partial.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")

    def result(self, result: dict[str, Any]) -> None:
        """Write ``result.json``, whole or not at all."""
        if self._writes:
            self.flush()
            with written_whole(self.folder / "result.json") as partial:
                partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    def _append(self, name: str, line: dict[str, Any]) -> None:
        """Write a line; one that cannot be written waits for the next. The file never ends in half a line."""
        if self._writes:
            self._waiting[name].append(json.dumps(line) + "\n")
            self._write_waiting(name)

    def _write_waiting(self, name: str) -> None:
        path, waiting = self.folder / name, self._waiting[name]
        size: int | None = None
        try:
            size = path.stat().st_size if path.exists() else 0
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(waiting))
        except OSError as error:
            with contextlib.suppress(OSError):
                if size is not None:
                    os.truncate(path, size)
            if name not in self._full:
                log.warning("%s cannot be written (%s); its lines wait until it can be", path, error)
            self._full.add(name)
        else:
            waiting.clear()
            self._full.discard(name)


def _parsed(text: str) -> dict[str, Any] | None:
    """A line of a record; none where it was cut short when the run was killed."""
    try:
        line: dict[str, Any] = json.loads(text)
    except ValueError:
        return None
    return line
