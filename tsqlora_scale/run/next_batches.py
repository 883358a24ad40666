"""The batches of every step, those of the next one made while the device works on the present one."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tsqlora_scale.step import longest_first, micro_batches

if TYPE_CHECKING:
    from tsqlora_scale.run.training_run import Run
    from tsqlora_scale.tasks import Batch


@dataclass(frozen=True)
class StepBatches:
    """What a step is taken on.

    Attributes:
        drawn: what the selector has drawn, (batch_size,) rows of the pool.
        rows: the same in the order in which they are cut into micro-batches.
        batches: this rank's micro-batches of ``rows``, on the host.
    """

    drawn: np.ndarray
    rows: np.ndarray
    batches: list[Batch]


class NextBatches:
    """Draws the rows of a step, and has its texts tokenized and padded; a context manager around a run's steps.

    While a step is taken, a thread prepares the next one's batches, from what the selector says that it would draw then
    (``draw_ahead``, where it has that). What is drawn in fact decides: a guess that scores or losses have overtaken is
    thrown away, so nothing depends on the thread, and a resumed run continues exactly. It works between :meth:`take`
    and :meth:`settle` alone: a tokenizer serves one thread at a time.

    Args:
        run: whose steps they are.
        last: the number of finished steps with which they end.
    """

    def __init__(self, run: Run, *, last: int) -> None:
        self._run, self._last = run, last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-batches")
        self._future: Future[StepBatches] | None = None
        self._guess: StepBatches | None = None
        #: Steps whose batches were there in time.
        self.hits = 0

    def __enter__(self) -> NextBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def take(self, step: int) -> StepBatches:
        """What the step that follows ``step`` finished ones is taken on; the one after it is prepared from now on."""
        drawn, guess = self._run.selector.draw(step), self._guess
        self._guess = None
        if guess is not None and np.array_equal(guess.drawn, drawn):
            self.hits += 1
        else:
            guess = self._prepared(drawn)
        likely = likely_rows(self._run.selector, step + 1) if step + 1 < self._last else None
        if likely is not None:
            self._future = self._thread.submit(self._prepared, likely)
        return guess

    def settle(self) -> None:
        """Wait for the thread, after the step."""
        if self._future is None:
            return
        # an error of the thread's is one of its guess; if it is more than that, the step itself will meet it
        self._guess = None if self._future.exception() else self._future.result()
        self._future = None

    def _prepared(self, drawn: np.ndarray) -> StepBatches:
        """The batches of drawn rows: a function of its arguments and the config."""
        run, rows = self._run, drawn
        size, world = run.plan.micro_batch_size, run.engine.world
        if run.config.train.group_by_length:
            rows = longest_first(drawn, run.task.sizes(drawn))
        batches = [run.task.batch(part) for part in micro_batches(rows, size, world.rank, world.size)]
        if world.device.type == "cuda":
            batches = [batch.pinned() for batch in batches]
        return StepBatches(drawn, rows, batches)


def likely_rows(selector: Any, step: int) -> np.ndarray | None:
    """What a selector will probably draw for the step that follows ``step`` finished ones; None where it does not say,
    as one of a user's own need not."""
    ahead = getattr(selector, "draw_ahead", None)
    rows: np.ndarray | None = None if ahead is None else ahead(step)
    return rows
