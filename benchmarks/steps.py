"""A step of a run without what the loop does before and after it."""

from __future__ import annotations

from tsqlora_scale.run.training_run import Run
from tsqlora_scale.step import optimizer_step


def bare_step(run: Run) -> float:
    """Draw, forward, backward and step, and the step's record; its loss."""
    with run.stepping():
        rows = run.selector.draw(run.step)
        result = optimizer_step(
            run.engine,
            run.task,
            rows,
            weights=run.selector.weights(rows),
            listener=run.ranks,
            samples=run.selector.listener,
            step=run.step,
            lr=run.lr,
            micro_batch_size=run.plan.micro_batch_size,
            seed=run.config.run.seed,
        )
        run.note_step(rows, result)
    return result.loss


def bare_steps(run: Run, count: int) -> list[float]:
    """Losses of the next steps, one after another."""
    found = []
    for _ in range(count):
        found.append(bare_step(run))
        run.step += 1
    return found


def adapt(run: Run) -> None:
    """A rank event now, with its record."""
    run.note_event(run.ranks.adapt(run.engine, run.selector.quality(), run.step))
