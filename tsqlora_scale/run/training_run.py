"""A run in progress: its parts, its records, and how all of it is saved and restored together."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tsqlora_scale.common.disk_arrays import filled
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.failures import Watchdog
from tsqlora_scale.common.files import WRITE_ERRORS
from tsqlora_scale.config.schema import Config
from tsqlora_scale.engine.engine import Engine
from tsqlora_scale.model.adapters.adapter_type import adapter_type
from tsqlora_scale.quality.selectors.selector import Selector
from tsqlora_scale.ranks import current_ranks
from tsqlora_scale.ranks.controller import RankController, RankEvent
from tsqlora_scale.report.progress import Progress
from tsqlora_scale.report.record import RunRecord
from tsqlora_scale.run.checkpoint import checkpoint_dir
from tsqlora_scale.run.draw_counts import DrawCounts
from tsqlora_scale.run.kept_adapter import named_base, write_adapter_of
from tsqlora_scale.run.lr_schedule import learning_rate
from tsqlora_scale.run.nonfinite import NonFiniteSteps
from tsqlora_scale.run.parameter_average import ParameterAverage
from tsqlora_scale.run.plan import RunPlan, due
from tsqlora_scale.run.preemption import StopRequest
from tsqlora_scale.run.resume import same_adapter
from tsqlora_scale.run.run_checkpoints import RunCheckpoints
from tsqlora_scale.step import StepResult, Teacher
from tsqlora_scale.tasks import Task
from tsqlora_scale.tasks.evaluation import evaluate_all

if TYPE_CHECKING:
    from tsqlora_scale.engine.train_state import TrainState

log = logging.getLogger("tsqlora_scale")


@dataclass
class Run:
    """Everything that a run owns. Built by :func:`.build_run`; :mod:`tsqlora_scale.training` moves it.

    It decides nothing: draws and scores are the selector's, ranks the controller's.
    """

    config: Config
    plan: RunPlan
    engine: Engine
    task: Task
    record: RunRecord
    selector: Selector
    ranks: RankController
    stop: StopRequest
    watchdog: Watchdog
    #: Optimizer steps done.
    step: int = 0
    #: Which pool rows have been trained on, (N,) bool.
    seen: np.ndarray = field(init=False)
    draws: DrawCounts = field(init=False)
    best: dict[str, Any] | None = None
    checkpoints: RunCheckpoints = field(init=False)
    average: ParameterAverage = field(init=False)
    #: What the run on plain text before this one was.
    pretraining: dict[str, Any] | None = None
    #: Digest of the trained adapter whose scores are taken, where one was given.
    given_adapter: str | None = None
    #: Of the average of the last parameters, once it is evaluated.
    average_metrics: dict[str, float] | None = None
    nonfinite: NonFiniteSteps = field(init=False)
    initial_ranks: dict[str, int] = field(default_factory=dict)
    metrics_before: dict[str, float] = field(default_factory=dict)
    #: Evaluations since the best one, and the step of the last of them.
    stale: int = 0
    judged: int = 0
    #: Where ``train.patience`` was at its end: ``step``, ``patience``, and the ``metrics`` of that evaluation.
    early_stop: dict[str, Any] | None = None
    #: What ``adapter/`` holds, once it is written.
    kept: dict[str, Any] = field(default_factory=dict)
    #: Where a resumed run became longer or shorter: ``step``, and the total steps ``before`` and ``after``.
    lengths: list[dict[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.nonfinite = NonFiniteSteps(self.config.train.max_nonfinite)
        self.checkpoints = RunCheckpoints(self.record.folder / "checkpoints", keep=self.config.train.checkpoint_keep)
        self.average = ParameterAverage(self.config)
        self.initial_ranks = current_ranks(self.engine.module)
        self._total_rank = sum(self.initial_ranks.values())
        with self.engine.world.together():
            self.seen = filled(self.plan.pool_size, bool, False)
        self.draws = DrawCounts(self.task.sets)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.engine.world.is_main

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to train."""
        return self.step >= self.plan.total_steps or self.early_stop is not None

    @property
    def stopped_early(self) -> dict[str, Any] | None:
        """:attr:`early_stop`, where it was before the end."""
        return self.early_stop if self.step < self.plan.total_steps else None

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(self.config.train, self.step, self.plan.total_steps)

    @property
    def teacher(self) -> Teacher | None:
        """The average of the last parameters, where ``train.distill`` learns from it and there is one yet."""
        weight = self.config.train.distill
        if weight is None or not self.average.steps:
            return None
        return Teacher(self.average.values(self.engine.module), weight.weight)

    def progress(self, what: str) -> Progress:
        """Progress shown by rank 0."""
        return Progress(what, shows=self.is_main, beat=self.watchdog.beat)

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Around a pass of the selector's: a checkpoint before the first one, and the scores on disk after it."""
        # a pass that is killed goes on with exactly these weights, on any number of ranks
        self.stop.interrupts_scoring = self.selector.table is None and self.save_checkpoint()
        with self.record.phase("scoring"):
            yield
            self.note_scores()
        self.stop.interrupts_scoring = False

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around the draw and the optimizer step."""
        warms_up = self.plan.scoring_step is not None and self.selector.table is None
        with self.record.phase("warmup" if warms_up else "training"):
            self._step_started = time.perf_counter()
            yield

    def note_step(self, rows: np.ndarray, result: StepResult) -> None:
        """Count a step on the pool's ``rows``, and write its line.

        Raises:
            UserError: on every rank, when too many steps had no finite loss or gradient.
        """
        lr = self.lr
        self.step += 1
        self.draws.add(rows)
        self.stop.agreed = result.stop
        if result.taken:
            self.seen[rows] = True
        outcome: dict[str, Any] = {"loss": result.loss}
        if result.teacher_gap is not None:
            outcome["teacher_gap"] = result.teacher_gap
        if result.failed:
            ids = self.task.sample_ids
            outcome = self.nonfinite.add(result, [ids[i] for i in rows.tolist()], [ids[i] for i in result.culprits])
        self.record.metrics(
            step=self.step,
            **outcome,
            lr=lr,
            grad_norm=result.grad_norm if result.taken else None,
            samples_seen=self.step * self.config.train.batch_size,
            total_rank=self._total_rank,
            seconds=round(time.perf_counter() - self._step_started, 6),
        )
        if result.failed:
            self.nonfinite.report(self.step, outcome, warns=self.is_main)

    def note_event(self, event: RankEvent) -> None:
        """Write the line of a rank event."""
        self._total_rank = sum(current_ranks(self.engine.module).values())  # a walk over all modules: not every step
        self.record.event(step=self.step, **event.line())

    def note_scores(self) -> None:
        """Write the selector's scores; on rank 0."""
        if self.is_main:
            try:
                self.write_scores()
            except WRITE_ERRORS as error:  # for people; the run has it in its checkpoints
                log.warning("the scores cannot be written (%s); the run goes on", error)

    def write_scores(self, *, with_texts: bool = False) -> Path | None:
        """Write the selector's table to ``scores/``, if it has one; the file. On rank 0.

        Args:
            with_texts: beside the samples' ids, texts and answers as the data have them.
        """
        if self.selector.table is None:
            return None
        given = self.task.given if with_texts else None
        return self.selector.table.write(self.record.folder / "scores", self.task.sample_ids, given=given)

    def after_step(self) -> None:
        """Evaluate and save, as far as either is due. A collective."""
        train = self.config.train
        self.average.after_step(self.step, self.engine)
        is_best = False
        if due(train.eval_every, self.step) and self.step < self.plan.total_steps:
            is_best = self.judge(self.evaluate())
        if due(train.checkpoint_every, self.step) or is_best:
            self.save_checkpoint()

    def stop_if_asked(self) -> None:
        """Leave a checkpoint and end, if any rank was asked to stop before the last step. A collective.

        Raises:
            Stopped: on every rank.
            UserError: on every rank, when the checkpoint cannot be written: the run's state is lost.
        """
        if not self.stop.agreed or self.is_over:
            return
        place = f"stopped on request after step {self.step} of {self.plan.total_steps}"
        if self.save_checkpoint():
            raise self.stop.stopped(place, self.engine.world)
        newest = self.checkpoints.newest
        lost = f"all after checkpoint {newest}" if newest else "all, as there is no checkpoint,"
        raise UserError(
            f"{place}, but the checkpoint cannot be written "
            f"to {str(self.record.folder)!r}: {lost} is lost; make room there, then resume (--resume)"
        )

    def say_if_finished(self) -> None:
        """Say that nothing is left to do, where a run is resumed at its end."""
        if not self.is_main or not self.is_over:
            return
        if self.early_stop is not None:
            log.warning(
                "the run is finished: it ended after step %d, as %d evaluations brought nothing better; "
                "a larger train.patience, or null, lets it go on",
                self.step,
                self.stale,
            )
        else:
            what = "the run is finished: all of its %d steps are done; train.max_steps (or train.epochs) extends it"
            log.warning(what, self.step)

    def final_metrics(self) -> dict[str, float]:
        """Metrics of what the run has come to; those of the evaluation that has ended it, if one has. A collective."""
        return self.evaluate() if self.stopped_early is None else dict(self.stopped_early["metrics"])

    def evaluate_on_start(self) -> None:
        """``metrics_before``, if they are asked for and not there. A collective."""
        if self.config.train.eval_on_start and not self.metrics_before:
            self.metrics_before = self.evaluate()

    def evaluate(self, *, key: str = "eval") -> dict[str, float]:
        """Metrics on every development set; empty without one.

        Args:
            key: of the metrics in ``metrics.jsonl``.
        """
        if self.task.dev is None:
            return {}
        with self.record.phase("evaluation"), self.progress("evaluating") as bar:
            metrics = evaluate_all(
                self.engine.module,
                self.task,
                self.engine.world,
                batch_size=self.config.train.eval_batch_size,
                progress=bar,
            )
        metrics = self.engine.world.broadcast(metrics)  # what follows from them is decided alike on every rank
        self.record.metrics(step=self.step, **{key: metrics})
        return metrics

    def judge(self, metrics: dict[str, float]) -> bool:
        """:meth:`note_best`, and count for ``train.patience``; of the evaluation at the end, too: the run may go on."""
        train, is_best = self.config.train, self.note_best(metrics)
        if due(train.eval_every, self.step) and self.judged != self.step:
            self.stale, self.judged = 0 if is_best else self.stale + 1, self.step
            if train.patience is not None and self.stale >= train.patience:
                self.early_stop = {"step": self.step, "patience": train.patience, "metrics": metrics}
        return is_best

    def note_best(self, metrics: dict[str, float]) -> bool:
        """Remember the best evaluation so far; whether this is it."""
        if not metrics:
            return False
        value = metrics[self.task.best_metric]
        if not math.isfinite(value):  # the correlation of answers that are all alike, for instance
            return False
        if self.best is not None and (
            value == self.best["value"] or (value > self.best["value"]) != self.task.higher_is_better
        ):
            return False
        name = checkpoint_dir(Path("checkpoints"), self.step).as_posix()
        self.best = {
            "step": self.step,
            "metric": self.task.best_metric,
            "value": value,
            "checkpoint": name,
            "metrics": metrics,
        }
        return True

    def save_checkpoint(self) -> bool:
        """Write ``checkpoints/step-…``; whether one of this step is there. A collective; rank 0 writes."""
        with self.record.phase("checkpointing"):
            state = self.engine.gather()
            untrained = adapter_type(self.config.adapter.type).untrained(self.engine.module)
            self.ranks.synchronize(self.engine.world)
            if self.is_main:
                self.record.flush()  # the lines up to this step are what a run that resumes from it does not write
                is_best = self.best is not None and self.best["step"] == self.step
                tree = {**self.state_dict(), "adapter": self.describe_adapter(state, untrained)}
                self.checkpoints.write(self.step, state, tree, is_best=is_best)
            self.checkpoints.newest = self.engine.world.broadcast(self.checkpoints.newest)
        return self.checkpoints.is_newest(self.step)

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

    def describe_adapter(self, state: TrainState, untrained: dict[str, torch.Tensor]) -> dict[str, Any]:
        """By which a checkpoint's parameters ``state`` become an adapter without the model. On rank 0.

        Args:
            untrained: what the adapter's file holds beside them.
        """
        values = {name: entry.value for name, entry in state.params.items()} | untrained
        kind = adapter_type(self.config.adapter.type)
        return {**kind.describe(self.engine.module, values, **named_base(self.config.model)), "untrained": untrained}

    def save_adapter(self, metrics: dict[str, float]) -> Path:
        """See :func:`.write_adapter_of`. A collective."""
        return write_adapter_of(self, metrics)

    def state_dict(self) -> dict[str, Any]:
        """All that changes during a run, beside parameters and moments: JSON values and tensors."""
        return {
            "step": self.step,
            "selector": self.selector.state_dict(),
            "controller": self.ranks.state_dict(),
            "ranks": current_ranks(self.engine.module),
            "initial_ranks": self.initial_ranks,
            "best": self.best,
            "best_kept": self.checkpoints.best,
            "nonfinite": self.nonfinite.count,
            "lengths": self.lengths,
            "stale": self.stale,
            "judged": self.judged,
            "given_adapter": self.given_adapter,
            "early_stop": self.early_stop,
            "average": self.average.state_dict(),
            "pretraining": self.pretraining,
            "loss_scaler": self.engine.scaler_state(),
            "metrics_before": self.metrics_before,
            "seen": torch.from_numpy(self.seen.view(np.uint8)),
            "draws": self.draws.state_dict(),
            "config": self.config.model_dump(mode="json"),
            "data": self.task.digest(),
            **self.record.state_dict(),
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Continue from a checkpoint; parameters, moments and ranks are in the engine already."""
        same_adapter(self.given_adapter, tree.get("given_adapter", self.given_adapter))
        self.seen[:] = tree["seen"].numpy()
        self.draws.load_state_dict(tree.get("draws", []))
        self.selector.load_state_dict(tree["selector"])
        self.ranks.load_state_dict(tree["controller"])
        self.step, self.best = tree["step"], tree["best"]
        self.checkpoints.resume(tree["best_kept"])
        self.nonfinite.count = tree["nonfinite"]
        self.average.load_state_dict(tree.get("average", {}))
        self.pretraining, self.judged = tree.get("pretraining"), tree.get("judged", tree["step"])
        self.lengths, self.stale = tree.get("lengths", []), tree.get("stale", 0)
        patience = self.config.train.patience
        if patience is not None and self.stale >= patience:
            self.early_stop = tree.get("early_stop")
        self.engine.load_scaler_state(tree["loss_scaler"])
        self.metrics_before, self.initial_ranks = tree["metrics_before"], tree["initial_ranks"]
        self.record.load_state_dict(tree)
