"""An optimizer step of a training inside an audit or a trial, which the run does not count as its own."""

from __future__ import annotations

import numpy as np

from tsqlora_scale.config.fields import as_steps
from tsqlora_scale.config.schema import TrainConfig
from tsqlora_scale.run.lr_schedule import learning_rate
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.step import StepResult, optimizer_step


def with_warmup_of(train: TrainConfig, whole: int, steps: int) -> TrainConfig:
    """The config of ``steps`` steps that warm up for the share that ``whole`` steps would."""
    if steps == whole:
        return train
    share = min(as_steps(train.lr_warmup, whole) / whole, 1.0)
    return train.model_copy(update={"lr_warmup": int(share * steps)})


def trial_step(run: Run, rows: np.ndarray, *, step: int, steps: int) -> StepResult:
    """The step that follows ``step`` finished ones of ``steps``, on the pool's ``rows``, as the config trains. A
    collective."""
    config = run.config
    return optimizer_step(
        run.engine,
        run.task,
        rows,
        listener=run.ranks,
        step=step,
        lr=learning_rate(with_warmup_of(config.train, run.plan.total_steps, steps), step, steps),
        micro_batch_size=run.plan.micro_batch_size,
        seed=config.run.seed,
        stop=run.stop.requested,
        beat=run.watchdog.beat,
    )
