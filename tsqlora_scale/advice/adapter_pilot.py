"""Trials by short trainings of the config's own adapter: minutes, and nearer to what a run does."""

from __future__ import annotations

import numpy as np

from tsqlora_scale.advice.pilot import ALONE, EVEN, POOL, QUERY, Pilot, ways_of
from tsqlora_scale.advice.pool_sample import PoolSample
from tsqlora_scale.advice.query_choice import choice_by_others
from tsqlora_scale.audit.cross_fit import restored
from tsqlora_scale.audit.passes import class_scores, look
from tsqlora_scale.audit.trial_step import trial_step
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import Config
from tsqlora_scale.engine.train_state import TrainState
from tsqlora_scale.quality import BatchSampler
from tsqlora_scale.quality.query.fits import folds_of
from tsqlora_scale.run.training_run import Run


def adapter_pilot(run: Run, config: Config, sample: PoolSample, *, steps: int, classes: int) -> Pilot:
    """Each half of the query judges adapters that were trained, for ``steps`` steps each way, without it. A collective.

    Args:
        config: of the run that is asked about.

    Raises:
        UserError: what an adapter says is not finite; on every rank.
    """
    count, rows, world = sample.count, len(sample.query), run.engine.world
    labelled = sample.shape.kind == "classes"
    answers = sample.answers
    strata = answers[count:].astype(np.int64) if labelled else None
    halves = folds_of(strata, rows, 2, seed=run.config.run.seed, purpose="advice folds")
    ways = ways_of(config)
    fits = {way: np.zeros(rows) for way in ways}
    hits = {way: np.zeros(rows) for way in ways}
    spread = 1.0 if labelled else float(answers.std()) or 1.0  # one for all: a half of the query may be all alike
    initial = run.engine.gather()
    for half in range(2):
        out = halves == half

        def choose(out: np.ndarray = out) -> dict[str, np.ndarray]:
            return draw_weights(config, sample, out, classes=classes)

        for way, weights in world.from_main(choose).items():
            name = f"half {half + 1} of 2, {way}"
            scores = train_way(run, sample, weights, initial, held_out=sample.query[out], steps=steps, name=name)
            fits[way][out], hits[way][out] = judge(run, sample.query[out], scores, spread=spread)
    return Pilot("adapters", fits, hits if labelled else None, {"steps": steps})


def draw_weights(config: Config, sample: PoolSample, out: np.ndarray, *, classes: int) -> dict[str, np.ndarray]:
    """How often every row of the sample and of the query is drawn, (n + m,), by way; those ``out`` (m,), and their
    copies, never."""
    count = sample.count
    known = sample.without(out)
    _, chosen = choice_by_others(config, sample, ~known[count:], classes=classes)
    drawn, own = np.split(np.where(known, sample.weights, 0.0), [count])
    joined = own * float(config.task.train_on_query)
    weights = {
        EVEN: np.concatenate([sample.in_shares(drawn), joined]),
        ALONE: np.concatenate([np.zeros(count), own]),
        QUERY: np.concatenate([sample.in_shares(drawn * chosen), joined]),
        POOL: np.concatenate([sample.in_shares(drawn), np.zeros_like(own)]),
    }
    return {way: weights[way] for way in ways_of(config)}


def train_way(
    run: Run,
    sample: PoolSample,
    weights: np.ndarray,
    initial: TrainState,
    *,
    held_out: np.ndarray,
    steps: int,
    name: str,
) -> np.ndarray:
    """What an adapter says of the pool's rows ``held_out`` after some steps on others, (k, width). A collective."""
    engine, config = run.engine, run.config
    engine.rebuild(lambda module, _: restored(module, initial))
    used = weights > 0
    alike = np.ptp(weights[used]) == 0
    sampler = BatchSampler(
        np.concatenate([sample.rows, sample.query])[used],
        None if alike else weights[used],
        batch_size=config.train.batch_size,
        seed=config.run.seed,
        # a row of a part stands for many, and is drawn as often as these
        replacement=not alike and (config.sampling.replacement or not sample.is_whole),
    )
    with run.progress(name) as bar:
        for step in range(steps):
            result = trial_step(run, sampler.draw(step), step=step, steps=steps)
            bar(step + 1, steps, f"loss {result.loss:.4f}")
    scores = look(run, held_out, class_scores(run), what=f"{name}: looking at it")
    with engine.world.together():
        if not np.isfinite(scores).all():
            raise UserError(
                f"the adapter of a trial ({name}) has diverged; lower train.lr={config.train.lr:g} or use "
                "model.dtype=fp32"
            )
    return scores


def judge(run: Run, rows: np.ndarray, scores: np.ndarray, *, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods (k,), of numbers with ``spread`` as their standard deviation, and hits, of the pool's ``rows`` by
    ``scores``."""
    if run.task.gives_probabilities:
        labels = np.asarray(run.task.references(rows), dtype=np.int64)
        hits = (scores.argmax(1) == labels).astype(np.float64)
        return scores[np.arange(len(rows)), labels].astype(np.float64), hits
    if run.config.task.type == "regression":
        numbers = np.asarray(run.task.references(rows), dtype=np.float64)
        return -0.5 * np.square((scores[:, 0] - numbers) / spread), np.zeros(len(rows))
    return -scores[:, 0].astype(np.float64), np.zeros(len(rows))
