"""Algorithm 1 of the paper: score the data, train on what scores well, move rank to where it counts."""

from __future__ import annotations

import time
from typing import Any

from tsqlora_scale.common.errors import Stopped, UserError
from tsqlora_scale.ranks import Plan, Statistics, agree, components, current_ranks, layer_dims, resize_model
from tsqlora_scale.report.result_table import build_result
from tsqlora_scale.run.lr_schedule import learning_rate
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.step import optimizer_step


def train(run: Run) -> dict[str, Any]:
    """Train to the end and leave the run folder complete.

    The trainer decides *when*; the modules know *what*. ``run.step`` counts finished optimizer steps.

    Returns:
        What ``result.json`` holds.
    """
    with run.record, run.watchdog:
        if run.step == 0 and not run.metrics_before:
            run.metrics_before = run.evaluate()
        take_steps(run)
        return finish(run)


def take_steps(run: Run) -> None:
    """Algorithm 1, from the step that the run has reached to the last one."""
    config, plan = run.config, run.plan
    with run.progress("training") as bar:
        while run.step < plan.total_steps:
            if run.step == plan.scoring_step and run.first_quality is None:
                score_pool(run)  # lines 2-4: Q, p and S
            loss = train_step(run)  # lines 5 and 9: a minibatch of S by p; the sensitivity listens
            if plan.schedule is not None and plan.schedule.due(run.step):
                run.events += 1
                if run.tracker is not None:
                    adapt_ranks(run)  # lines 7 and 8: S, then r
                refresh_scores(run)
            evaluates = due(config.train.eval_every, run.step) and run.step < plan.total_steps
            is_best = evaluates and run.note_best(run.evaluate())
            if due(config.train.checkpoint_every, run.step) or is_best:
                run.save_checkpoint()
            bar(run.step, plan.total_steps, f"loss {loss:.4f}")
            stop_if_asked(run)


def finish(run: Run) -> dict[str, Any]:
    """Evaluate, and write the adapter and the result."""
    metrics = run.evaluate()
    run.note_best(metrics)
    run.save_checkpoint()
    adapter = run.save_adapter()
    if run.scorer is not None and run.is_main and not run.config.scoring.keep_sketches:
        run.scorer.discard_parts()
    result = build_result(run, metrics, adapter)
    run.write_on_main("result.json", lambda: run.record.result(result))
    return result


def train_step(run: Run) -> float:
    """One optimizer step on the next global batch; its loss."""
    start = time.perf_counter()
    lr = learning_rate(run.config.train, run.step, run.plan.total_steps)
    with run.record.phase("warmup" if run.scorer and run.first_quality is None else "training"):
        drawn = run.draw()
        result = optimizer_step(
            run.engine,
            run.task,
            run.tracker,
            drawn,
            weights=None if run.importance is None else run.importance[drawn],
            step=run.step,
            lr=lr,
            micro_batch_size=run.plan.micro_batch_size,
            seed=run.config.run.seed,
            stop=run.stop.requested,
            beat=run.watchdog.beat,
        )
    run.step += 1
    run.stop.agreed = result.stop
    if result.taken:
        run.seen[drawn] = True
    outcome: dict[str, Any] = {"loss": result.loss}
    if result.failed:
        ids = run.task.train["sample_id"]
        outcome = run.nonfinite.add(result, [ids[i] for i in drawn.tolist()], [ids[i] for i in result.culprits])
    run.record.metrics(
        step=run.step,
        **outcome,
        lr=lr,
        grad_norm=result.grad_norm if result.taken else None,
        samples_seen=run.step * run.config.train.batch_size,
        total_rank=sum(current_ranks(run.engine.module).values()),
        seconds=round(time.perf_counter() - start, 6),
    )
    if result.failed:
        run.nonfinite.report(run.step, outcome, warns=run.is_main)
    return result.loss


def score_pool(run: Run) -> None:
    """Eq. 1 and 2: a quality for every sample, the subset S, and p for the draws from it."""
    # a pass that is killed goes on with exactly these weights, on any number of ranks
    run.stop.interrupts_scoring = run.save_checkpoint()
    run.first_quality = run.score().mean_quality()
    run.stop.interrupts_scoring = False


def stop_if_asked(run: Run) -> None:
    """Leave a checkpoint and end, if any rank was asked to stop before the last step. A collective.

    Raises:
        Stopped: on every rank.
        UserError: on every rank, when the checkpoint cannot be written: the run's state is lost.
    """
    if run.stop.agreed and run.step < run.plan.total_steps:
        if run.save_checkpoint():
            raise Stopped(f"stopped on request after step {run.step} of {run.plan.total_steps}")
        newest = run.newest_checkpoint
        kept = f"all after checkpoint {newest}" if newest else "all, as there is no checkpoint,"
        raise UserError(
            f"stopped on request after step {run.step} of {run.plan.total_steps}, but the checkpoint cannot be written "
            f"to {str(run.record.folder)!r}: {kept} is lost; make room there, then resume (--resume)"
        )


def adapt_ranks(run: Run) -> None:
    """Eq. 3 and 6: gather the sensitivities, agree on a plan, resize every layer on every rank."""
    assert run.tracker is not None and run.policy is not None
    start = time.perf_counter()
    with run.record.phase("resizing"):
        module = run.engine.module
        before = current_ranks(module)
        quality = run.scorer.table.mean_quality() if run.scorer and run.scorer.table else None
        statistics = Statistics(
            sensitivity=run.tracker.reduce(run.engine.world),
            ranks=before,
            dims=layer_dims(module),
            initial_rank=run.config.adapter.r,
            quality=quality or 1.0,
            first_quality=run.first_quality or quality or 1.0,
            progress=run.plan.schedule.progress(run.step) if run.plan.schedule else 1.0,
            components=components(run.engine.gather(), before) if run.policy.needs_components else {},
        )
        plan = agree(run.policy.plan(statistics), run.engine.world)
        errors = resize(run, plan) if plan.ranks != before else {}
    run.record.event(
        step=run.step,
        phi=plan.phi,
        budget=plan.budget,
        quality=quality,
        sensitivity=plan.sensitivity,
        ranks=plan.ranks,
        reasons=plan.reasons,
        shrink_error=errors,
        seconds=round(time.perf_counter() - start, 6),
    )


def resize(run: Run, plan: Plan) -> dict[str, float]:
    """Install a plan: gather, pure algebra, rebuild. Returns the relative error of each layer that shrank."""
    assert run.tracker is not None
    errors: dict[str, float] = {}
    sketches = run.tracker.sketches()

    def change(module: Any, state: Any) -> Any:
        new_state, shrink_errors = resize_model(
            module, state, plan, cfg=run.config.resize, seed=run.config.run.seed, step=run.step, sketches=sketches
        )
        errors.update(shrink_errors)
        return new_state

    run.engine.rebuild(change)
    return errors


def refresh_scores(run: Run) -> None:
    """Score a share of S anew where the config says so, and draw by the new p from the next step on."""
    refresh = run.config.scoring.refresh
    if run.scorer is None or run.first_quality is None or refresh == "none":
        return
    if refresh != "every_event" and run.events % int(refresh):
        return
    run.score(refresh=True)


def due(every: int | None, step: int) -> bool:
    """Whether something that happens every ``every`` steps happens after ``step``."""
    return every is not None and step % every == 0
