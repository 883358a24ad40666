"""A run in progress: the parts that Algorithm 1 moves, and how they are saved and restored together."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsqlora_scale.common.disk_arrays import counted, filled, positions
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.failures import Watchdog
from tsqlora_scale.common.files import WRITE_ERRORS
from tsqlora_scale.config.schema import Config
from tsqlora_scale.engine.engine import Engine
from tsqlora_scale.engine.train_state import TrainState
from tsqlora_scale.model.adapters.lora import save_adapter
from tsqlora_scale.quality import BatchSampler, QualityScorer, ScoreTable, importance_weights, select_subset
from tsqlora_scale.ranks import Policy, SensitivityTracker, current_ranks
from tsqlora_scale.report.progress import Progress
from tsqlora_scale.report.record import RunRecord
from tsqlora_scale.run.checkpoint import checkpoint_dir, complete_checkpoints, prune, write_checkpoint
from tsqlora_scale.run.nonfinite import NonFiniteSteps
from tsqlora_scale.run.preemption import StopRequest
from tsqlora_scale.run.preflight import RunPlan
from tsqlora_scale.tasks import Task
from tsqlora_scale.tasks.evaluation import evaluate

log = logging.getLogger("tsqlora_scale")


@dataclass
class Run:
    """Everything that a run owns. Built by :func:`build_run`; :mod:`tsqlora_scale.training` moves it."""

    config: Config
    plan: RunPlan
    engine: Engine
    task: Task
    record: RunRecord
    tracker: SensitivityTracker | None
    scorer: QualityScorer | None
    policy: Policy | None
    stop: StopRequest
    watchdog: Watchdog
    #: Optimizer steps done.
    step: int = 0
    #: Events of the schedule done.
    events: int = 0
    sampler: BatchSampler = field(init=False)
    #: Weights of the samples' losses, (N,); none: all equal. A function of the scores in force.
    importance: np.ndarray | None = None
    first_quality: float | None = None
    #: Which pool rows have been trained on, (N,) bool.
    seen: np.ndarray = field(init=False)
    best: dict[str, Any] | None = None
    #: Name of the best step's checkpoint, or of the best before it if that could not be written. Known on rank 0.
    best_kept: str | None = None
    #: Name of the newest checkpoint there was when one was last to be written.
    newest_checkpoint: str | None = None
    nonfinite: NonFiniteSteps = field(init=False)
    initial_ranks: dict[str, int] = field(default_factory=dict)
    metrics_before: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nonfinite = NonFiniteSteps(self.config.train.max_nonfinite)
        self.initial_ranks = current_ranks(self.engine.module)
        with self.engine.world.together():
            self.seen = filled(self.plan.pool_size, bool, False)
            pool = counted(self.plan.pool_size)
            if self.config.adapter.method == "tsqlora" and self.config.sampling.selector == "random":
                chosen = select_subset(self.plan.pool_size, None, self.config.sampling, seed=self.config.run.seed)
                pool = positions(chosen)
            self.use_samples(pool, None)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.engine.world.is_main

    def use_samples(self, indices: np.ndarray, probabilities: np.ndarray | None) -> None:
        """Draw from ``indices`` by ``probabilities`` (none: uniformly) from the next step on."""
        self.sampler = BatchSampler(
            indices,
            probabilities,
            batch_size=self.config.train.batch_size,
            seed=self.config.run.seed,
            replacement=self.config.sampling.replacement and probabilities is not None,
            start=self.step,
        )

    def draw(self) -> np.ndarray:
        """The next global batch, (batch_size,) pool rows: a function of the seed and the step alone."""
        return self.sampler.draw(self.step)

    def progress(self, what: str) -> Progress:
        """Progress shown by rank 0."""
        return Progress(what, shows=self.is_main, beat=self.watchdog.beat)

    def evaluate(self) -> dict[str, float]:
        """Metrics on the development split; empty without one."""
        if self.task.dev is None:
            return {}
        with self.record.phase("evaluation"), self.progress("evaluating") as bar:
            metrics = evaluate(
                self.engine.module,
                self.task,
                self.engine.world,
                batch_size=self.config.train.eval_batch_size,
                progress=bar,
            )
        self.record.metrics(step=self.step, eval=metrics)
        return metrics

    def note_best(self, metrics: dict[str, float]) -> bool:
        """Remember the best evaluation so far; whether this is it."""
        if not metrics:
            return False
        value = metrics[self.task.best_metric]
        if not math.isfinite(value):  # the correlation of answers that are all alike, for instance
            return False
        if self.best is not None and (value > self.best["value"]) != self.task.higher_is_better:
            return False
        if self.best is not None and value == self.best["value"]:
            return False
        name = checkpoint_dir(Path("checkpoints"), self.step).as_posix()
        self.best = {"step": self.step, "metric": self.task.best_metric, "value": value, "checkpoint": name}
        return True

    def save_checkpoint(self) -> bool:
        """Write ``checkpoints/step-…``; whether one of this step is there. A collective; rank 0 writes."""
        with self.record.phase("checkpointing"):
            state = self.engine.gather()
            if self.tracker is not None:
                self.tracker.synchronize(self.engine.world)
            if self.is_main:
                self.record.flush()  # the lines up to this step are what a run that resumes from it does not write
                self._write_checkpoint(state)
                newest = complete_checkpoints(self.record.folder / "checkpoints")
                self.newest_checkpoint = newest[-1].name if newest else None
            self.newest_checkpoint = self.engine.world.broadcast(self.newest_checkpoint)
        return self.newest_checkpoint == checkpoint_dir(Path(), self.step).name

    def _write_checkpoint(self, state: TrainState) -> None:
        """Write a checkpoint and prune the others; on rank 0. Where it cannot be written, the run goes on without."""
        root = self.record.folder / "checkpoints"
        best_kept = self.best_kept
        if self.best is not None and self.best["step"] == self.step:
            self.best_kept = Path(self.best["checkpoint"]).name
        try:
            write_checkpoint(checkpoint_dir(root, self.step), state, self.state_dict())
        except WRITE_ERRORS as error:
            self.best_kept = best_kept
            newest = complete_checkpoints(root)
            log.warning(
                "the checkpoint of step %d cannot be written (%s); the run goes on, its newest checkpoint is %s",
                self.step,
                error,
                newest[-1].name if newest else "none",
            )
            return
        try:
            prune(root, keep=self.config.train.checkpoint_keep, protect={self.best_kept} if self.best_kept else set())
        except OSError as error:
            log.warning("older checkpoints cannot be removed (%s)", error)

    def write_on_main(self, what: str, write: Callable[[], object]) -> None:
        """Let rank 0 write. A collective.

        Raises:
            UserError: on every rank, when it cannot.
        """
        with self.engine.world.together():
            if self.is_main:
                try:
                    write()
                except WRITE_ERRORS as error:
                    raise UserError(
                        f"{what} cannot be written ({error}); make room there, then resume (--resume)"
                    ) from None

    def save_adapter(self) -> Path:
        """Write ``adapter/``, plain PEFT. A collective; rank 0 writes."""
        folder = self.record.folder / "adapter"
        values = {name: entry.value for name, entry in self.engine.gather().params.items()}

        def write() -> None:
            save_adapter(self.engine.module, values, folder, base_name=self.config.model.name_or_path)
            self.task.tokenizer.save_pretrained(str(folder))

        self.write_on_main(f"the adapter, {str(folder)!r},", write)
        return folder

    def state_dict(self) -> dict[str, Any]:
        """All that changes during a run, beside parameters and moments: JSON values and tensors."""
        return {
            "step": self.step,
            "events": self.events,
            "sampler": self.sampler.state_dict(),
            "ranks": current_ranks(self.engine.module),
            "initial_ranks": self.initial_ranks,
            "first_quality": self.first_quality,
            "best": self.best,
            "best_kept": self.best_kept,
            "nonfinite": self.nonfinite.count,
            "loss_scaler": self.engine.scaler_state(),
            "metrics_before": self.metrics_before,
            "seen": torch.from_numpy(self.seen.view(np.uint8)),
            "tracker": self.tracker.state_dict() if self.tracker else None,
            "scorer": self.scorer.state_dict() if self.scorer else None,
            "config": self.config.model_dump(mode="json"),
            "data": self.task.digest("train"),
            "seconds": dict(self.record.seconds),
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Continue from a checkpoint; parameters, moments and ranks are already in the engine."""
        self.step = tree["sampler"]["start"]
        self.seen[:] = tree["seen"].numpy()
        if self.scorer is not None and tree["scorer"]["table"] is not None:
            with self.engine.world.together():
                self.scorer.load_state_dict(tree["scorer"])
            self.draw_by_scores()
        self.sampler.load_state_dict(tree["sampler"])
        self.step, self.events = tree["step"], tree["events"]
        self.first_quality, self.best, self.best_kept = tree["first_quality"], tree["best"], tree["best_kept"]
        self.nonfinite.count = tree["nonfinite"]
        self.engine.load_scaler_state(tree["loss_scaler"])
        self.metrics_before, self.initial_ranks = tree["metrics_before"], tree["initial_ranks"]
        if self.tracker is not None:
            self.tracker.load_state_dict(tree["tracker"])
        self.record.seconds.update(tree["seconds"])
        self.write_on_main(
            f"{str(self.record.folder)!r}", lambda: self.record.rewind(self.step, last_step=self.plan.total_steps)
        )

    def score(self, *, refresh: bool = False) -> ScoreTable:
        """Score the pool, or a share of S, and draw by the new scores from the next step on. A collective."""
        assert self.scorer is not None
        with self.record.phase("scoring"):
            table = self.scorer.score(self.engine.module, refresh=refresh, model_key=self.model_key())
            self._use_scores(table)
        return table

    def take_scores(self, table: ScoreTable, seconds: float) -> bool:
        """Draw by the scores of another model's pass, which took ``seconds``; whether a checkpoint holds them. A
        collective."""
        assert self.scorer is not None
        self.scorer.adopt(table)
        self.first_quality = table.mean_quality()
        self.record.seconds["scoring"] = self.record.seconds.get("scoring", 0.0) + seconds
        self._use_scores(table)
        if not self.metrics_before:  # here, or a run killed between this checkpoint and the next would do it again
            self.metrics_before = self.evaluate()
        return self.save_checkpoint()

    def _use_scores(self, table: ScoreTable) -> None:
        """Draw by the scorer's new table, and write it."""
        assert self.scorer is not None
        self.draw_by_scores()
        if self.is_main:
            try:
                self.write_scores()
            except WRITE_ERRORS as error:  # for people; the run has it in its checkpoints
                log.warning("the scores cannot be written (%s); the run goes on", error)

    def write_scores(self) -> None:
        """Write the scorer's table to ``scores/``. On rank 0."""
        assert self.scorer is not None and self.scorer.table is not None
        self.scorer.table.write(self.record.folder / "scores", self.scorer.sample_ids)

    def model_key(self) -> str:
        """Says which weights the model has: the base by its name, what is trained by a digest. A collective."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.engine.gather().params.items()):
            digest.update(name.encode())
            digest.update(entry.value.numpy().tobytes())
        model = self.config.model
        return f"{model.name_or_path} {model.dtype} {model.quantization} {digest.hexdigest()}"

    def draw_by_scores(self) -> None:
        """Draw from S by p, as the scores in force say (Algorithm 1, lines 4 and 9). A collective.

        Raises:
            UserError: the disk of TMPDIR has no room, on any rank.
        """
        assert self.scorer is not None
        with self.engine.world.together():
            del self.sampler  # large pools have room on disk for one
            self.importance = None
            chosen, weights = self.scorer.draws()
            self.use_samples(chosen, weights)
            if self.config.sampling.unbiased:
                self.importance = filled(self.plan.pool_size, np.float64, 1.0)
                self.importance[chosen] = importance_weights(weights, self.config.sampling.max_weight)
