"""Algorithm 1 of the paper: score the data, train on what scores well, move rank to where it counts."""

from __future__ import annotations

from typing import Any

from tsqlora_scale.model.model_card import write_card
from tsqlora_scale.run.kept_adapter import evaluate_average
from tsqlora_scale.run.next_batches import NextBatches
from tsqlora_scale.run.outcome import build_result
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.step import StepResult, optimizer_step


def train_to_the_end(run: Run) -> dict[str, Any]:
    """Train, and leave the run folder complete.

    Returns:
        What ``result.json`` holds.
    """
    with run.record, run.watchdog:
        if run.step == 0:
            run.evaluate_on_start()
        run.say_if_finished()
        take_steps(run)
        return finish(run)


def take_steps(run: Run, *, until: int | None = None) -> StepResult | None:
    """Algorithm 1, from the step that the run has reached to its end, or to ``until`` finished steps.

    The loop decides *when*; the selector, the engine and the controller know *what*. Line numbers are the paper's.

    Returns:
        What the last step did; None if there was none.
    """
    engine, selector, ranks = run.engine, run.selector, run.ranks
    last = run.plan.total_steps if until is None else until
    result: StepResult | None = None
    with run.progress("training") as bar, NextBatches(run, last=last) as nexts:
        while run.step < last and not run.is_over:
            if selector.due(run.step):
                with run.scoring():
                    selector.score(engine.module, run.step)  # lines 2 and 9: Q, p and S
            with run.stepping():
                found = nexts.take(run.step)  # line 4: a minibatch of S by p
                result = optimizer_step(  # lines 4 and 5: loss, backward and step; the controller listens
                    engine,
                    run.task,
                    found.rows,
                    batches=found.batches,
                    weights=selector.weights(found.rows),
                    teacher=run.teacher,
                    listener=ranks,
                    samples=selector.listener,
                    step=run.step,
                    lr=run.lr,
                    micro_batch_size=run.plan.micro_batch_size,
                    seed=run.config.run.seed,
                    stop=run.stop.requested,
                    beat=run.watchdog.beat,
                )
                nexts.settle()
                run.note_step(found.rows, result)
            if ranks.due(run.step):
                with run.record.phase("resizing"):
                    event = ranks.adapt(engine, selector.quality(), run.step)  # lines 7 and 8: S_l, then r_l
                run.note_event(event)
            run.after_step()  # evaluation and checkpoint
            bar(run.step, last, f"loss {result.loss:.4f}")
            run.stop_if_asked()
    return result


def warm_up_and_score(run: Run, *, warm_up: bool = True) -> None:
    """Algorithm 1 up to line 2: the plan's steps on even draws, if asked to, and one pass over the pool."""
    assert run.plan.scoring_step is not None
    if run.selector.table is not None:
        return
    with run.record, run.watchdog:
        if warm_up:
            take_steps(run, until=run.plan.scoring_step)
        with run.scoring():
            run.selector.score(run.engine.module, run.step)


def finish(run: Run) -> dict[str, Any]:
    """Evaluate, and write the adapter and the result."""
    if run.task.dev is not None and run.stopped_early is None and not run.checkpoints.is_newest(run.step):
        run.save_checkpoint()  # an evaluation may last longer than a job has left that was asked to stop
    metrics = run.final_metrics()
    run.judge(metrics)
    run.save_checkpoint()
    evaluate_average(run)
    adapter = run.save_adapter(metrics)
    run.selector.finish()
    if run.config.scores_online:
        run.note_scores()  # with what the last steps have said
    result = build_result(run, metrics, adapter)
    run.write_on_main("the model card", lambda: write_card(adapter, run.config, result))
    run.write_on_main("result.json", lambda: run.record.result(result))
    return result
