"""``accelerate launch … offloaded.py FOLDER OUT``: a small run under ZeRO-3 on one rank, and what became of it."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from tsqlora_scale.common.failures import leave_group
from tsqlora_scale.common.quiet import prepare_environment

prepare_environment()

import torch

from benchmarks.random_models import EVERY, build, encoder, without_files, write_folder
from benchmarks.steps import adapt, bare_step, bare_steps
from tsqlora_scale.ranks import current_ranks
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.tasks import Task


def left_out(run: Run) -> bool:
    """Whether a step whose loss is not a number changes no value."""
    before = run.engine.gather()
    sums: Callable[..., Any] = Task.loss_sums

    def worse(*arguments: Any) -> Any:
        of_samples, counts = sums(*arguments)
        return of_samples * math.nan, counts

    Task.loss_sums = worse  # type: ignore[method-assign, assignment]
    try:
        bare_step(run)
    finally:
        Task.loss_sums = sums  # type: ignore[method-assign]
    after = run.engine.gather()
    return all(torch.equal(entry.value, after.params[name].value) for name, entry in before.params.items())


def clocked(work: Callable[[], Any]) -> float:
    """Milliseconds of a call."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Steps, an event, a step that is left out, a checkpoint, and the run that goes on from it."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    shape = encoder("small", hidden=256, layers=4, heads=4, batch=8, length=64)
    write_folder(shape, folder, 64)
    # a step before an event is listened to, whatever the number of steps
    run, checked = build(shape, folder, dtype="fp32", sensitivity={"window": EVERY})
    bare_steps(run, 2)
    step_ms = clocked(lambda: bare_steps(run, 1))
    before = current_ranks(run.engine.module)
    step, run.step = run.step, EVERY
    event_ms = clocked(lambda: adapt(run))
    run.step = step
    after = current_ranks(run.engine.module)
    bare_steps(run, 2)
    was_left_out = left_out(run)
    run.save_checkpoint()
    expected = bare_steps(run, 4)
    with without_files():
        again = build_run(checked, resume="auto")
    found = bare_steps(again, 4)
    told = {
        "engine": run.engine.name,
        "step_ms": step_ms,
        "event_ms": event_ms,
        "changed": sum(after[name] != rank for name, rank in before.items()),
        "same": sum(a == b for a, b in zip(expected, found, strict=True)) / len(found),
        "left_out": float(was_left_out),
    }
    out.write_text(json.dumps(told) + "\n", encoding="utf-8")
    leave_group(0)


if __name__ == "__main__":
    main()
