"""``result.json`` and the closing table."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsqlora_scale.report.record import peak_memory_bytes
from tsqlora_scale.report.score_tables import plain

if TYPE_CHECKING:
    from tsqlora_scale.run.training_run import Run

LIBRARIES = ("tsqlora-scale", "torch", "transformers", "accelerate", "peft", "deepspeed", "bitsandbytes", "datasets")


def versions() -> dict[str, str]:
    """Installed versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def build_result(run: Run, metrics: dict[str, float], adapter: Path) -> dict[str, Any]:
    """Everything that the run is judged by. A collective (peak memory of every rank)."""
    from tsqlora_scale.model.adapters.lora import short_name
    from tsqlora_scale.ranks import current_ranks

    world = run.engine.world
    seconds = {name: round(value, 3) for name, value in sorted(run.record.seconds.items())}
    stepping = seconds.get("warmup", 0.0) + seconds.get("training", 0.0)
    whole = sum(seconds.values())
    state = run.engine.gather()
    return {
        "name": run.config.run.name,
        "method": run.config.adapter.method,
        "engine": run.engine.name,
        "world_size": world.size,
        "distributed_type": run.engine.accelerator.distributed_type.value,
        "frozen_parameters": run.engine.frozen_parameters(),
        "steps": run.step,
        "metrics_before": run.metrics_before,
        "metrics": metrics,
        "best": _best(run),
        "pool_size": run.plan.pool_size,
        "subset_size": run.plan.subset_size,
        "distinct_samples_seen": int(run.seen.sum()),
        "samples_drawn": run.step * run.config.train.batch_size,
        "trainable_parameters": sum(entry.value.numel() for entry in state.params.values()),
        "ranks_start": {short_name(n): r for n, r in run.initial_ranks.items()},
        "ranks_end": {short_name(n): r for n, r in current_ranks(run.engine.module).items()},
        "seconds": seconds,
        "wall_seconds": round(whole, 3),
        "samples_per_second": round(run.step * run.config.train.batch_size / stepping, 2) if stepping else None,
        "share_of_run": {k: round(seconds.get(k, 0.0) / whole, 4) for k in ("scoring", "resizing")} if whole else {},
        "peak_memory_bytes": world.gather_objects(peak_memory_bytes(world.device)),
        "adapter": str(adapter),
        "versions": versions(),
    }


def _best(run: Run) -> dict[str, Any] | None:
    """The best evaluation; its checkpoint is none where that could not be written."""
    if run.best is None or Path(run.best["checkpoint"]).name == run.best_kept:
        return run.best
    return {**run.best, "checkpoint": None}


def print_result(result: dict[str, Any]) -> None:
    """The closing table: what changed, what was used, what it cost, where it is."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{result['name']}: {result['method']} on {result['engine']}", show_header=False)
    for name, value in result["metrics"].items():
        before = result["metrics_before"].get(name)
        table.add_row(
            f"{name} before -> after", f"{before:.4f} -> {value:.4f}" if before is not None else f"{value:.4f}"
        )
    if result["best"]:
        best = result["best"]
        table.add_row(
            f"best {best['metric']}", f"{best['value']:.4f} at step {best['step']} ({best['checkpoint'] or 'not kept'})"
        )
    table.add_row(
        "samples",
        f"{result['distinct_samples_seen']} of the pool's {result['pool_size']} seen, "
        f"{result['samples_drawn']} drawn in {result['steps']} steps",
    )
    table.add_row("trainable parameters", f"{result['trainable_parameters']:,}")
    for name, share in result["share_of_run"].items():
        table.add_row(f"{name} cost", f"{100 * share:.1f} % of the run's {result['wall_seconds']:.0f} s")
    if result["samples_per_second"]:
        table.add_row("training speed", f"{result['samples_per_second']:.1f} samples/s")
    table.add_row("adapter", plain(result["adapter"]))
    console.print(table)
    if result["ranks_start"] != result["ranks_end"]:
        ranks = Table("layer", "rank at start", "rank at end", title="ranks")
        for name, start in result["ranks_start"].items():
            ranks.add_row(plain(name), str(start), str(result["ranks_end"][name]))
        console.print(ranks)
