"""From a look to a verdict, and the file that says so."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tsqlora_scale.advice.adapter_pilot import adapter_pilot
from tsqlora_scale.advice.advice_result import AdviceResult
from tsqlora_scale.advice.advised_config import config_lines, loses_held_out
from tsqlora_scale.advice.head_pilot import head_pilot
from tsqlora_scale.advice.paired import LEVEL
from tsqlora_scale.advice.pilot import ALONE, EVEN, POOL, QUERY, Pilot
from tsqlora_scale.advice.pool_sample import PoolSample, look_at_sample
from tsqlora_scale.advice.pool_shares import PoolShare, near_copies, off_target, redundant, wrong_labels
from tsqlora_scale.advice.query_choice import PoolRatio
from tsqlora_scale.advice.verdict import Trials, Verdict, decide
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.files import WRITE_ERRORS, written_whole
from tsqlora_scale.config.schema import Config
from tsqlora_scale.quality import BatchSampler
from tsqlora_scale.run.plan import subset_size, total_steps
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.step import optimizer_step

#: Ways that are compared: the first less the second, where both were tried.
PAIRS = {
    "query_less_even": (QUERY, EVEN),
    "alone_less_even": (ALONE, EVEN),
    "query_less_alone": (QUERY, ALONE),
    "even_less_pool": (EVEN, POOL),
    "query_less_pool": (QUERY, POOL),
    "alone_less_pool": (ALONE, POOL),
}
#: Steps that are timed, after one that is not.
TIMED = 3


@dataclass(frozen=True)
class PoolFindings:
    """What a look alone says. On rank 0, and sent from there.

    Attributes:
        shares: by name; None where they cannot be told.
        evidence: area, standard errors, whether they are evidence, and the share on target; nothing without a query.
        fit_seconds: of what a choice by the query fits.
    """

    shares: dict[str, PoolShare | None]
    evidence: dict[str, Any]
    fit_seconds: float


def look_and_judge(run: Run, config: Config, *, rows: int, steps: int | None) -> AdviceResult:
    """Look, try, time some steps, decide, and write ``advice/advice.json``. A collective.

    Args:
        run: as :func:`.config_of_look` has it.
        config: of the run that is asked about.
        rows: of the pool to look at.
        steps: of each training of an adapter; None: heads in closed form are tried.

    Raises:
        UserError: on every rank.
    """
    world, seed, started = run.engine.world, config.run.seed, time.perf_counter()
    classes = max(run.config.task.num_labels, 1)
    with run.watchdog:
        sample = look_at_sample(run, rows)
        found = world.from_main(lambda: pool_findings(run, sample, classes=classes))
        pilot: Pilot | None = None
        if len(sample.query) and steps is not None:
            pilot = adapter_pilot(run, config, sample, steps=steps, classes=classes)
        elif len(sample.query) and sample.shape.kind != "text":
            pilot = world.from_main(lambda: head_pilot(config, sample, classes=classes))
        step_seconds = world.broadcast(timed_step(run))
    trials = None if pilot is None else trials_of(pilot, seed=seed)
    verdict = decide(
        evidence=found.evidence.get("standard errors"),
        is_evident=found.evidence.get("evident", False),
        trials=trials,
        wrong=found.shares["wrong labels"],
        redundant=found.shares["redundant rows"],
        joins_query=config.task.train_on_query,
    )
    queried = len(sample.query) if config.task.train_on_query else 0
    steps_of_run = total_steps(config.train, subset_size(config, sample.size + queried, queried))
    lines = config_lines(config, verdict, steps=steps_of_run, labels=run.config.task.labels)
    if verdict.way == ALONE and loses_held_out(config):
        gone = "the held-out rows come with the pool; give task.dataset.dev_file a file of such rows to evaluate on"
        verdict = replace(verdict, reasons=(*verdict.reasons, gone))
    looked = cost(sample, found, step_seconds=step_seconds, steps=steps_of_run)
    looked["seconds of this advice"] = round(world.broadcast(time.perf_counter() - started), 2)
    summary = summarise(verdict, lines, sample, found, looked)
    if pilot is not None and trials is not None:
        summary["trials"] = trials_told(pilot, trials)
    summary["expected gain over even draws"] = expected_gain(verdict, pilot, seed=seed)
    file = config.run_dir / "advice" / "advice.json"
    with world.together():
        if world.is_main:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with written_whole(file) as partial:
                    partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
            except WRITE_ERRORS as error:
                raise UserError(f"the advice, {str(file)!r}, cannot be written ({error}); make room there") from None
    return AdviceResult(file, verdict.way, list(verdict.reasons), lines, summary)


def pool_findings(run: Run, sample: PoolSample, *, classes: int) -> PoolFindings:
    """Shares of the pool, and how the query stands out of it."""
    seed, count = run.config.run.seed, sample.count
    groups, times = near_copies(run, sample)
    shares = {
        "wrong labels": wrong_labels(sample, groups, classes=classes, seed=seed),
        "redundant rows": redundant(sample, groups, times, seed=seed),
    }
    if not len(sample.query):
        return PoolFindings(shares, {}, 0.0)
    start = time.perf_counter()
    labelled = classes if sample.shape.kind == "classes" else 0
    pool, query = sample.numbers[:count], sample.numbers[count:]
    ratio = PoolRatio.fit(sample.shape, pool, query, copies=sample.copies, seed=seed, classes=labelled)
    seconds = time.perf_counter() - start
    shares["off target"] = off_target(ratio, seed=seed)
    evidence = {
        "area": round(ratio.standing.area, 4),
        "standard errors": round(ratio.standing.evidence, 2),
        "evident": ratio.standing.is_evident,
        "share on target": round(ratio.standing.share, 4),
        "at most": round(ratio.standing.most, 4),
    }
    return PoolFindings(shares, evidence, seconds)


def trials_of(pilot: Pilot, *, seed: int) -> Trials:
    """The differences that a verdict looks at."""
    tried = {name: pair for name, pair in PAIRS.items() if set(pair) <= pilot.fits.keys()}
    return Trials(**{name: pilot.gain(way, less, seed=seed) for name, (way, less) in tried.items()})


def trials_told(pilot: Pilot, trials: Trials) -> dict[str, Any]:
    """For a file: differences in nats and, of classes, in accuracy, and the accuracies themselves."""
    gains = {" less ".join(PAIRS[name]): gain for name, gain in vars(trials).items() if gain is not None}
    nats = {name: gain.nats.rounded() for name, gain in gains.items()}
    told = {"of": pilot.kind, **pilot.notes, "judged on": len(pilot.fits[EVEN]), "nats a row": nats}
    if pilot.hits is None:
        return told
    accuracy: dict[str, Any] = {way: round(float(hits.mean()), 4) for way, hits in pilot.hits.items()}
    points = {name: gain.points.rounded() for name, gain in gains.items() if gain.points is not None}
    return {**told, "accuracy": accuracy | points}


def timed_step(run: Run) -> float:
    """Median seconds of an optimizer step of the config's batch on even draws. A collective; the adapter learns."""
    config, seconds = run.config, []
    sampler = BatchSampler(
        np.arange(len(run.task)),
        None,
        batch_size=config.train.batch_size,
        seed=config.run.seed,
        replacement=True,
    )
    for step in range(1 + TIMED):
        start = time.perf_counter()
        optimizer_step(
            run.engine,
            run.task,
            sampler.draw(step),
            listener=run.ranks,
            step=step,
            lr=config.train.lr,
            micro_batch_size=run.plan.micro_batch_size,
            seed=config.run.seed,
            beat=run.watchdog.beat,
        )
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def cost(sample: PoolSample, found: PoolFindings, *, step_seconds: float, steps: int) -> dict[str, Any]:
    """Seconds of a look at the whole pool, by the seconds of this one, beside those of a run's steps."""
    looked_at = sample.count + len(sample.query)
    whole = sample.seconds / looked_at * (sample.size + len(sample.query)) + found.fit_seconds
    run = step_seconds * steps
    return {
        "a step": round(step_seconds, 4),
        "by": f"{TIMED} steps that were timed",
        "steps": steps,
        "the run": round(run, 1),
        "a look at the whole pool": round(whole, 1),
        "look / run": round(whole / run, 4),
        "look in steps": round(whole / step_seconds, 1),
    }


def summarise(
    verdict: Verdict,
    lines: dict[str, Any],
    sample: PoolSample,
    found: PoolFindings,
    looked: dict[str, Any],
) -> dict[str, Any]:
    """What ``advice.json`` holds, trials aside."""
    return {
        "verdict": verdict.way,
        "reasons": list(verdict.reasons),
        "trains on query": verdict.way == ALONE or (bool(len(sample.query)) and verdict.joins_query),
        "config": lines,
        "pool": sample.size,
        "looked at": sample.count,
        "query": len(sample.query),
        "shares": {name: None if share is None else share.summary() for name, share in found.shares.items()},
        "with probability": LEVEL,
        "query against pool": found.evidence,
        "cost in seconds": looked,
    }


def expected_gain(verdict: Verdict, pilot: Pilot | None, *, seed: int) -> dict[str, list[float]] | None:
    """Of the verdict's way over the pool and the query, evenly, mean and interval; None where nothing was tried."""
    way = POOL if verdict.way == EVEN and not verdict.joins_query else verdict.way
    if way == EVEN or (way == POOL and (pilot is None or POOL not in pilot.fits)):
        return {"nats a row": [0.0, 0.0, 0.0], "accuracy": [0.0, 0.0, 0.0]}
    if pilot is None:
        return None
    gain = pilot.gain(way, EVEN, seed=seed)
    found = {"nats a row": gain.nats.rounded()}
    return found if gain.points is None else {**found, "accuracy": gain.points.rounded()}
