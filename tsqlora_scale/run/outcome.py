"""What ``result.json`` says of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tsqlora_scale.config.model_section import ADAPTER_TRAITS
from tsqlora_scale.config.prompt_template import words_by_class
from tsqlora_scale.model.adapters.lora import short_name
from tsqlora_scale.ranks import current_ranks
from tsqlora_scale.report.result_table import versions
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.tasks.metrics import metric_title


def build_result(run: Run, metrics: dict[str, float], adapter: Path) -> dict[str, Any]:
    """Everything that the run is judged by. A collective (peak memory of every rank).

    Args:
        metrics: of the last step; those of what ``adapter/`` holds stand before them.
        adapter: that folder.
    """
    world = run.engine.world
    seconds = {name: round(value, 3) for name, value in sorted(run.record.seconds.items())}
    stepping = seconds.get("warmup", 0.0) + seconds.get("training", 0.0)
    whole = sum(seconds.values())
    state = run.engine.gather()
    scorer = getattr(run.selector, "scorer", None)  # of selectors that score
    return {
        "name": run.config.run.name,
        "method": run.config.adapter.method,
        "seed": run.config.run.seed,
        **_identity(run),
        "engine": run.engine.name,
        "world_size": world.size,
        "distributed_type": run.engine.distributed_type,
        "frozen_parameters": run.engine.frozen_parameters(),
        "steps": run.step,
        "lengths": run.lengths,
        "metrics_before": run.metrics_before,
        "metrics": run.kept["metrics"],
        "metrics_last": metrics,
        "kept": {
            "which": run.kept["which"],
            "step": run.kept["step"],
            "ranks": {short_name(n): r for n, r in run.kept["ranks"].items()},
        },
        "pretraining": run.pretraining,
        "average": _average(run),
        "stopped_early": run.stopped_early and {key: run.stopped_early[key] for key in ("step", "patience")},
        "metric_titles": {name: metric_title(name, run.config.task.labels) for name in metrics},
        "prompt": _prompt(run),
        "best": _best(run),
        "pool_size": run.plan.pool_size,
        "subset_size": _subset_size(run),
        "findings": getattr(run.selector, "findings", None) or None,
        "measured": getattr(scorer, "measured", None) if scorer is not None and scorer.table is not None else None,
        "distinct_samples_seen": int(run.seen.sum()),
        "samples_drawn": run.step * run.config.train.batch_size,
        "draws_by_set": run.draws.by_set(),
        "trainable_parameters": sum(entry.value.numel() for entry in state.params.values()),
        "ranks_start": {short_name(n): r for n, r in run.initial_ranks.items()},
        "ranks_end": {short_name(n): r for n, r in current_ranks(run.engine.module).items()},
        "seconds": seconds,
        "wall_seconds": round(whole, 3),
        "samples_per_second": round(run.step * run.config.train.batch_size / stepping, 2) if stepping else None,
        "share_of_run": {k: round(seconds.get(k, 0.0) / whole, 4) for k in ("scoring", "resizing")} if whole else {},
        "peak_memory_bytes": world.gather_objects(run.record.memory.highest),
        "peak_memory_by_phase": _highest(world.gather_objects(run.record.memory.bytes)),
        "adapter": str(adapter),
        "versions": versions(),
    }


def _identity(run: Run) -> dict[str, Any]:
    """What may not differ between runs that one table shows: task, model, data and code."""
    task, model = run.config.task, run.config.model
    base = getattr(run.engine.module, "config", None)
    return {
        "task": {
            "type": task.type,
            "data": [each.model_dump(mode="json", exclude_defaults=True) for each in task.datasets],
            "metrics": task.metrics,
            "decides": run.task.best_metric,
            "higher_is_better": run.task.higher_is_better,
        },
        "model": {
            "name": model.name_or_path,
            "revision": model.revision,
            "commit": getattr(base, "_commit_hash", None),
            "dtype": model.dtype,
            "quantization": model.quantization,
        },
        "data": {"train": run.task.digest(), "dev": run.task.digest("dev") if run.task.dev is not None else None},
        "code": {
            "version": versions().get("tsqlora-scale", "not installed"),
            "source": run.record.code,
            "earlier": _earlier_code(run),
        },
    }


def _earlier_code(run: Run) -> list[str]:
    """Digests of other code by which a part of the run, or of one before it, was made."""
    before = [] if run.pretraining is None else run.pretraining.get("code", [])
    return [each for each in dict.fromkeys([*before, *run.record.earlier_code]) if each != run.record.code]


def _average(run: Run) -> dict[str, Any] | None:
    """The average of the last parameters: of which steps, and its metrics; None without one."""
    if run.average_metrics is None:
        return None
    return {"steps": run.average.steps, "metrics": run.average_metrics}


def _highest(peaks: list[dict[str, int]]) -> dict[str, int]:
    """Of every phase the peak of the rank that needs most; nothing without a GPU."""
    names = sorted({name for one in peaks for name in one})
    return {name: max(one.get(name, 0) for one in peaks) for name in names}


def _subset_size(run: Run) -> int:
    """Samples of S: as planned, or as many as the selector has found."""
    table = run.selector.table
    return run.plan.subset_size if table is None else int(np.count_nonzero(table.selected))


def _prompt(run: Run) -> dict[str, Any] | None:
    """What the base is asked, and by which words it answers; ``metrics_before`` are those of the base alone where the
    run ``starts_from_base``: from nothing learned before, and by an adapter that changes nothing at first."""
    task, adapter = run.config.task, run.config.adapter
    if task.prompt is None:
        return None
    labels = task.labels if isinstance(task.labels, list) else [str(number) for number in range(task.num_labels)]
    words = words_by_class(task.label_words, task.labels) if isinstance(task.label_words, list | dict) else []
    return {
        "template": task.prompt,
        "label_words": dict(zip(labels, words, strict=False)),
        "demonstrations": len(task.demonstrated),
        "starts_from_base": not (adapter.init_from or ADAPTER_TRAITS[adapter.type].prompts or run.config.pretrains),
    }


def _best(run: Run) -> dict[str, Any] | None:
    """The best evaluation; its checkpoint is none where that could not be written."""
    if run.best is None:
        return None
    best = {key: value for key, value in run.best.items() if key != "metrics"}
    return best if Path(best["checkpoint"]).name == run.checkpoints.best else {**best, "checkpoint": None}
