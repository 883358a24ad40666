"""The closing table, and the versions that a result depends on."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from tsqlora_scale.report.score_tables import findings_told, plain

#: What the adapter's folder holds, by ``train.keep``.
HELD = {"last": "last step,", "best": "best evaluation,", "average": "average of the last snapshots, to step"}
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


def _unlearned(prompt: dict[str, Any]) -> str:
    """What an evaluation before the first step is of a base that is asked by a prompt."""
    shown = prompt["demonstrations"]
    return f"untrained, {shown} demonstrations" if shown else "zero-shot"


def print_result(result: dict[str, Any]) -> None:
    """The closing table: what changed, what was used, what it cost, where it is."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{result['name']}: {result['method']} on {result['engine']}", show_header=False)
    prompt = result.get("prompt")
    first = "before" if prompt is None or not prompt["starts_from_base"] else _unlearned(prompt)
    for name, value in result["metrics"].items():
        before = result["metrics_before"].get(name)
        title = result.get("metric_titles", {}).get(name, name)
        if before is None:
            table.add_row(plain(title), f"{value:.4f}")
        else:
            table.add_row(plain(f"{title} {first} -> after"), f"{before:.4f} -> {value:.4f}")
    if prompt is not None:
        words = ", ".join(f"{name} -> {word}" for name, word in prompt["label_words"].items())
        table.add_row("prompt", plain(f"{prompt['template']} ({words})"))
    if result["best"]:
        best = result["best"]
        table.add_row(
            f"best {best['metric']}", f"{best['value']:.4f} at step {best['step']} ({best['checkpoint'] or 'not kept'})"
        )
    kept, early = result["kept"], result["stopped_early"]
    if kept["step"] != result["steps"] or kept.get("which") == "average":
        for name, value in result["metrics_last"].items():
            table.add_row(plain(f"{result.get('metric_titles', {}).get(name, name)} of the last step"), f"{value:.4f}")
    if early:
        table.add_row("stopped early", f"after step {early['step']}: {early['patience']} evaluations brought no better")
    table.add_row(
        "samples",
        f"{result['distinct_samples_seen']} of the pool's {result['pool_size']} seen, "
        f"{result['samples_drawn']} drawn in {result['steps']} steps",
    )
    for name, each in (result.get("draws_by_set") or {}).items():
        asked = "" if each["asked"] is None else f" ({100 * each['asked']:.1f} % asked for)"
        share = "" if each["share"] is None else f", {100 * each['share']:.1f} %{asked}"
        drawn = f"{each['drawn']} drawn{share}, of its {each['pool']} samples"
        table.add_row(plain(f"samples of {name}"), drawn)
    for name, value in findings_told(result.get("findings") or {}):
        table.add_row(plain(name), plain(value))
    table.add_row("trainable parameters", f"{result['trainable_parameters']:,}")
    for name, share in result["share_of_run"].items():
        table.add_row(f"{name} cost", f"{100 * share:.1f} % of the run's {result['wall_seconds']:.0f} s")
    if result["samples_per_second"]:
        table.add_row("training speed", f"{result['samples_per_second']:.1f} samples/s")
    holds = f"the {HELD[kept.get('which', 'last')]} {kept['step']}"
    table.add_row("adapter", f"{plain(result['adapter'])} ({holds})")
    console.print(table)
    if result["ranks_start"] != result["ranks_end"]:
        ranks = Table("layer", "rank at start", "rank at end", title="ranks")
        for name, start in result["ranks_start"].items():
            ranks.add_row(plain(name), str(start), str(result["ranks_end"][name]))
        console.print(ranks)
