"""A comparison from its file to its tables and figures."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.comparison.comparison_file import Comparison, read_comparison
from tsqlora_scale.comparison.comparison_tables import write_tables
from tsqlora_scale.comparison.crew import Crew
from tsqlora_scale.comparison.drawn_figures import draw_comparison
from tsqlora_scale.comparison.findings_of_arms import Found, gather
from tsqlora_scale.comparison.processes import Launch
from tsqlora_scale.comparison.trial_queue import Shard, TrialQueue
from tsqlora_scale.comparison.trials import TrialPlan
from tsqlora_scale.config.schema import Config

#: Rows of a pool whose tokens are counted for a budget of tokens.
COUNTED_ROWS = 1024


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison has come to.

    Attributes:
        text: the tables, as ``tables.md`` has them; empty for a share of the runs, which writes none.
        failed: runs without a result, and why.
        missing: runs that are still to be made.
        figures: their files.
    """

    out: Path
    text: str
    failed: dict[str, str]
    missing: list[str]
    figures: list[Path]


class ComparisonRun:
    """A comparison in its folder.

    Args:
        path: its file.
        out: the folder of its runs, tables and figures; none: ``runs/compare/NAME``, with ``-small`` for ``small``.
        small: as the file's section ``small`` says.
        overrides: ``section.key=value`` for all runs.
        leave_out: arms whose config is refused count as failed, and the others run.
        runs: whether anything is to be run, for which arms need a length that suits them.

    Raises:
        UserError: a mistake in the file or, of any arm on any task, in the config.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        out: str | Path | None = None,
        small: bool = False,
        overrides: Sequence[str] = (),
        leave_out: bool = False,
        shard: Shard | None = None,
        runs: bool = True,
    ) -> None:
        self.comparison: Comparison = read_comparison(path, small=small)
        name = f"{self.comparison.name}-small" if small else self.comparison.name
        self.out = Path("runs") / "compare" / name if out is None else Path(out)
        self._shard = shard or Shard()
        self.trials = TrialPlan(self.comparison, self.out, overrides)
        self.trials.check(leave_out=leave_out, runs=runs)
        self.queue = TrialQueue(self.trials, shard=self._shard, mean_tokens=mean_tokens)

    def plan(self) -> list[str]:
        """What there is to run, a line each, in order, as far as it is known before the first run."""
        lines = [
            f"{'finished' if self.queue.is_finished(trial) else 'to run'}: {trial}" for trial in self.queue.known()
        ]
        unknown = self.queue.most() - len(lines)
        return [*lines, *([f"and {unknown} runs that follow from these"] if unknown else [])]

    def run(self, launch: Launch) -> None:
        """Run what is missing.

        Raises:
            UserError: the folder cannot be written, or another process is at work in it.
            Stopped: a request to stop has come.
        """
        launch.check()
        launch.check_devices()
        check_writable(self.out)
        from tsqlora_scale.run.run_lock import FolderLock

        whole = self._shard.count == 1
        place = self.out if whole else self.out / "shards" / f"{self._shard.number}-of-{self._shard.count}"
        with ExitStack() as stack:
            lock = FolderLock(place, what="comparison")
            stack.callback(lock.release)
            Crew(self.queue, launch).run()

    def report(self, *, figures: Literal["svg", "png"] | None = None, tables: bool = True) -> ComparisonResult:
        """Write tables and figures of what is there.

        Raises:
            UserError: runs of one table have other data; or a file cannot be written.
        """
        found = gather(self.queue)
        text = ""
        if tables:
            check_writable(self.out)
            self.out.mkdir(parents=True, exist_ok=True)
            text = write_tables(found, self.out)
        drawn = draw_comparison(found, self.out / "figures", kind=figures) if figures is not None else []
        return ComparisonResult(self.out, text, found.failures, self._missing(found), drawn)

    def _missing(self, found: Found) -> list[str]:
        """Runs of this process's share that are neither finished nor failed."""
        if self._shard.count == 1:
            return found.missing
        return [
            str(trial)
            for trial in self.queue.known()
            if not self.queue.is_finished(trial) and str(trial) not in found.failures
        ]


def check_writable(folder: Path) -> None:
    """Check that a folder, which need not be there, can be written to.

    Raises:
        UserError: naming it.
    """
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"--out {str(folder)!r}: cannot be written to ({error.strerror}); choose another") from None


def mean_tokens(config: Config) -> float:
    """Mean tokens of a row of a config's pool as it is trained on, input and target, over at most
    :data:`COUNTED_ROWS` even places.

    Raises:
        UserError: data or tokenizer are not there.
    """
    import numpy as np

    from tsqlora_scale.run import preflight
    from tsqlora_scale.tasks import IGNORED, load_data

    data = load_data(config.task, seed=config.run.seed)
    config = preflight.demonstrated(config.with_labels(data.labels), data)
    task = preflight.describe(config, data).task
    rows = np.unique(np.linspace(0, len(task) - 1, min(len(task), COUNTED_ROWS)).astype(int))
    total = 0
    for start in range(0, len(rows), 64):
        batch = task.batch(rows[start : start + 64])
        total += int(batch.inputs["attention_mask"].sum())
        if config.task.type == "seq2seq":  # of other tasks they are among the inputs
            total += int((batch.targets != IGNORED).sum())
    return total / len(rows)
