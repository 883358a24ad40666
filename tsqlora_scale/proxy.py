"""Scoring by a smaller model than the one trained: ``scoring.proxy_model``.

The proxy gets an adapter of its own and the config's warm-up, scores the pool once, and is given up before the model
that is trained is loaded. Its pass is an ordinary scoring run in a run folder of its own, and resumes like one.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass

import torch

from tsqlora_scale.config.schema import Config
from tsqlora_scale.quality import ScoreTable
from tsqlora_scale.quality.scores.score_parts import PARTS
from tsqlora_scale.quality.selectors.by_quality import QualitySelector
from tsqlora_scale.report.record import RunRecord
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.preemption import StopRequest
from tsqlora_scale.run.preflight import Preflight, naming_the_proxy
from tsqlora_scale.run.resume import has_checkpoint
from tsqlora_scale.run.run_lock import RunLock
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.training import warm_up_and_score


def take_scores(run: Run, scores: ProxyScores) -> bool:
    """Draw by a proxy's scores; whether a checkpoint holds them. A collective."""
    assert isinstance(run.selector, QualitySelector)
    run.record.seconds["scoring"] = run.record.seconds.get("scoring", 0.0) + scores.seconds
    run.selector.adopt(scores.table, run.step)
    run.note_scores()
    if not run.metrics_before:  # here, or a run killed between this checkpoint and the next would do it again
        run.metrics_before = run.evaluate()
    return run.save_checkpoint()


@dataclass(frozen=True)
class ProxyScores:
    """The table of a proxy's pass, and what it took to get there."""

    table: ScoreTable
    seconds: float


def discard_parts(config: Config) -> None:
    """Remove the raw numbers that a proxy's pass has left, once they are in a checkpoint or of no use. On rank 0."""
    if config.scores_by_proxy and not config.scoring.keep_sketches:
        shutil.rmtree(config.of_proxy().run_dir / PARTS, ignore_errors=True)


def score_by_proxy(
    preflight: Preflight, *, resume: str | None, stop: StopRequest, lock: RunLock | None = None
) -> ProxyScores | None:
    """Load the proxy, warm it up, score the pool, and free it. A collective; the same table on every rank.

    Args:
        preflight: of the run that trains.
        resume: as for that run. A checkpoint of it holds the scores, and the proxy is not needed any more; a proxy
            that was killed continues.
        stop: by which it is asked to stop.
        lock: of the folders of both runs.

    Returns:
        None where there is no proxy, or no need of it.
    """
    if preflight.proxy is None or (resume is not None and has_checkpoint(preflight.config.run_dir, resume)):
        return None
    start = time.perf_counter()
    with naming_the_proxy(preflight.config):
        run = build_run(preflight.proxy, resume="auto" if resume is not None else None, stop=stop, lock=lock)
    # what an earlier run left in the folder of this one must not be resumed when the proxy is stopped
    record = RunRecord(preflight.config.run_dir, writes=run.is_main)
    run.write_on_main(f"{str(record.folder)!r}", lambda: record.prepare(preflight.config.to_yaml()))
    with naming_the_proxy(preflight.config):
        warm_up_and_score(run)
    table = run.selector.table
    assert table is not None
    run.engine.close()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return ProxyScores(table, time.perf_counter() - start)
