"""Something of a test's own in the steps of a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from tsqlora_scale import training
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.engine.engine import Engine
from tsqlora_scale.quality.draws.batch_sampler import BatchSampler
from tsqlora_scale.run.training_run import Run


class Killed(BaseException):
    """What no handler may catch."""


def take_step(run: Run) -> float:
    """Algorithm 1 for one more step, with what is due before and after it; the step's loss."""
    result = training.take_steps(run, until=run.step + 1)
    assert result is not None
    return result.loss


def before_steps(action: Callable[[int, Engine], None]) -> Callable[..., Any]:
    """An ``optimizer_step`` for :mod:`tsqlora_scale.training` that is told of every step before it is taken.

    Args:
        action: of (finished steps, the engine).
    """
    optimizer_step = training.optimizer_step

    def wrapper(engine: Engine, *arguments: Any, **options: Any) -> Any:
        action(options["step"], engine)
        return optimizer_step(engine, *arguments, **options)

    return wrapper


def killed_in_step(step: int) -> Callable[..., Any]:
    """One that dies after ``step`` finished steps."""

    def action(number: int, _: Engine) -> None:
        if number == step:
            raise Killed

    return before_steps(action)


def signalled_in_step(step: int, signal_number: int, *, rank: int | None = None) -> Callable[..., Any]:
    """A ``BatchSampler.draw`` in which the process (of this rank; none: any) gets a signal after ``step`` steps."""
    draw = BatchSampler.draw

    def wrapper(sampler: BatchSampler, number: int) -> np.ndarray:
        if number == step and rank in (None, launched_rank()):
            os.kill(os.getpid(), signal_number)
        return draw(sampler, number)

    return wrapper
