"""The runs that come before a run, in run folders of their own: on plain text, and of a smaller model that scores.

``pretrain``: the same adapter on plain text. The run goes on with it, and with a new head.

``scoring.proxy_model``: the proxy gets an adapter of its own and the config's warm-up, scores the pool once, and is
given up before the model that is trained is loaded. Its pass is an ordinary scoring run, and resumes like one.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass

import torch

from tsqlora_scale.common.errors import naming
from tsqlora_scale.config.schema import Config
from tsqlora_scale.quality import ScoreTable
from tsqlora_scale.quality.scores.score_parts import PARTS
from tsqlora_scale.quality.selectors.by_quality import QualitySelector
from tsqlora_scale.ranks import current_ranks
from tsqlora_scale.report.record import RunRecord
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.preemption import StopRequest
from tsqlora_scale.run.preflight import Preflight, naming_the_proxy
from tsqlora_scale.run.pretrained import Pretrained
from tsqlora_scale.run.resume import has_checkpoint
from tsqlora_scale.run.run_lock import RunLock
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.training import train_to_the_end, warm_up_and_score

log = logging.getLogger("tsqlora_scale")


def take_scores(run: Run, scores: ProxyScores) -> bool:
    """Draw by a proxy's scores; whether a checkpoint holds them. A collective."""
    assert isinstance(run.selector, QualitySelector)
    run.record.seconds["scoring"] = run.record.seconds.get("scoring", 0.0) + scores.seconds
    run.record.note_code(scores.code)
    run.selector.adopt(scores.table, run.step)
    run.note_scores()
    run.evaluate_on_start()  # here, or a run killed between this checkpoint and the next would do it again
    return run.save_checkpoint()


@dataclass(frozen=True)
class ProxyScores:
    """The table of a proxy's pass, what it took to get there, all processes together, and by which code."""

    table: ScoreTable
    seconds: float
    code: list[str]


def discard_parts(config: Config) -> None:
    """Remove the raw numbers that a proxy's pass has left, once they are in a checkpoint or of no use. On rank 0."""
    if config.scores_by_proxy and not config.scoring.keep_sketches:
        shutil.rmtree(config.of_proxy().run_dir / PARTS, ignore_errors=True)


def pretrain(
    preflight: Preflight, *, resume: str | None, stop: StopRequest, lock: RunLock | None = None
) -> Pretrained | None:
    """Train the adapter on plain text, and free the model. A collective; the same on every rank.

    Args:
        preflight: of the run that goes on with it.
        resume: as for that run. A checkpoint of it holds the adapter, and nothing is left to do here; a pretraining
            that was killed continues, and one that had ended is read.
        stop: by which it is asked to stop.
        lock: of the folders of all runs.

    Returns:
        None where there is none, or no need of it.
    """
    config = preflight.config
    if preflight.pretraining is None or (resume is not None and has_checkpoint(config.run_dir, resume)):
        return None
    with naming("pretrain"):
        run = build_run(preflight.pretraining, resume="auto" if resume is not None else None, stop=stop, lock=lock)
    _prepare_folder(preflight, run)
    if run.is_main:
        log.warning("pretraining: %s, %d steps", config.pretrain.objective, run.plan.total_steps)
    with naming("pretrain"):
        result = train_to_the_end(run)
    found = Pretrained(
        ranks=current_ranks(run.engine.module),
        values={name: entry.value for name, entry in run.engine.gather().params.items()},
        summary={
            "objective": config.pretrain.objective,
            "folder": str(run.record.folder),
            "steps": run.step,
            "texts": run.plan.pool_size,
            "metrics_before": result["metrics_before"],
            "metrics": result["metrics_last"],
            "seconds": result["wall_seconds"],  # of the processes before this one, too
            "code": run.record.state_dict()["code"],
        },
    )
    _free(run)
    return found


def _prepare_folder(preflight: Preflight, before: Run) -> None:
    """Make the folder of the run itself new: what an earlier run left in it must not be resumed when one before it is
    stopped."""
    record = RunRecord(preflight.config.run_dir, writes=before.is_main)
    before.write_on_main(f"{str(record.folder)!r}", lambda: record.prepare(preflight.config.to_yaml()))


def _free(run: Run) -> None:
    run.engine.close()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    with naming_the_proxy(preflight.config):
        run = build_run(preflight.proxy, resume="auto" if resume is not None else None, stop=stop, lock=lock)
    _prepare_folder(preflight, run)
    with naming_the_proxy(preflight.config):
        warm_up_and_score(run)
    table = run.selector.table
    assert table is not None
    _free(run)
    return ProxyScores(table, sum(run.record.seconds.values()), run.record.state_dict()["code"])
