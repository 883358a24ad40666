"""What ``adapter/`` holds at the end of a run: the last step, the best evaluation, or an average (``train.keep``)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsqlora_scale.config.locations import lasting
from tsqlora_scale.config.schema import ModelConfig
from tsqlora_scale.model.adapters.adapter_type import adapter_type
from tsqlora_scale.ranks import current_ranks
from tsqlora_scale.run.trained_adapter import write_from_checkpoint

if TYPE_CHECKING:
    from tsqlora_scale.run.training_run import Run

log = logging.getLogger("tsqlora_scale")


def named_base(model: ModelConfig) -> dict[str, Any]:
    """What ``adapter_config.json`` says of the base."""
    return {"base_name": lasting(model.name_or_path, key="model.name_or_path"), "revision": model.revision}


def evaluate_average(run: Run) -> None:
    """Evaluate the average of the last parameters, if there is to be one. A collective."""
    if run.config.train.average_last is None:
        return
    if not run.average.steps:  # the run has ended early, before the first snapshot
        run.average.take(run.step, run.engine)
    if run.average_metrics is None:
        with run.engine.holding(run.average.values(run.engine.module)):
            run.average_metrics = run.evaluate(key="eval_average")


def write_adapter_of(run: Run, metrics: dict[str, float]) -> Path:
    """Write ``adapter/``, plain PEFT, as ``train.keep`` says, and note it in :attr:`.Run.kept`. A collective; rank 0
    writes.

    Args:
        metrics: of the last step.
    """
    folder, keep = run.record.folder / "adapter", run.config.train.keep
    module = run.engine.module
    values = {name: entry.value for name, entry in run.engine.gather().params.items()}
    kind = adapter_type(run.config.adapter.type)
    untrained = kind.untrained(module)
    is_best = run.best is not None and run.best["step"] == run.step
    which = "best" if is_best and keep == "best" else "last"
    run.kept = {"which": which, "step": run.step, "metrics": metrics, "ranks": current_ranks(module)}
    if keep == "average":
        evaluate_average(run)
        values = dict(run.average.values(module))
        run.kept |= {"which": "average", "metrics": run.average_metrics}

    def write() -> None:
        kind.save(module, values | untrained, folder, **named_base(run.config.model))
        best = _best_checkpoint(run)
        if best is not None:  # in the place of the last step's two files; what else belongs to an adapter stays
            assert run.best is not None
            ranks = write_from_checkpoint(best, folder)["ranks"]
            best_metrics = run.best.get("metrics", {run.best["metric"]: run.best["value"]})
            run.kept = {"which": "best", "step": run.best["step"], "metrics": best_metrics, "ranks": ranks}
        run.task.tokenizer.save_pretrained(str(folder))

    run.write_on_main(f"the adapter, {str(folder)!r},", write)
    run.kept = run.engine.world.broadcast(run.kept)
    return folder


def _best_checkpoint(run: Run) -> Path | None:
    """The checkpoint that ``train.keep`` asks for in the place of the last step. On rank 0."""
    if run.config.train.keep != "best" or (run.best is not None and run.best["step"] == run.step):
        return None
    if run.best is None or Path(run.best["checkpoint"]).name != run.checkpoints.best:
        log.warning("adapter/ holds the last step: the best evaluation's checkpoint could not be kept")
        return None
    return run.record.folder / str(run.best["checkpoint"])
