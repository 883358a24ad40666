"""The plan of a run, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from tsqlora_scale.planning.engine_memory import GIB, EngineMemory
from tsqlora_scale.planning.forecast import Forecast
from tsqlora_scale.report.score_tables import plain

NOTHING: Mapping[str, Any] = MappingProxyType({})


def print_forecast(found: Forecast) -> None:
    """Memory by part and engine, what is proposed, and the time by phase."""
    console = Console()
    first = found.engines[0]
    samples = f"{first.micro_batch_size} samples of a rank at once"
    title = f"{plain(found.config.model.name_or_path)}: GiB of each of {first.devices} devices, {samples}"
    table = Table("", *(memory.engine for memory in found.engines), title=title)
    for part in first.parts:
        sizes = [memory.parts[part] for memory in found.engines]
        if any(sizes):
            table.add_row(part, *(_gib(size) for size in sizes))
    table.add_section()
    for phase in first.phases:
        table.add_row(f"at its most: {phase}", *(_gib(memory.phases[phase]) for memory in found.engines))
    table.add_row("allowed for, not counted", *(_gib(memory.allowance) for memory in found.engines))
    table.add_row("needed", *(_gib(memory.total) for memory in found.engines))
    console.print(table)
    console.print(proposal_told(found), highlight=False, soft_wrap=True)
    for line in remedies_told(found):
        console.print(line, highlight=False, soft_wrap=True)
    for note in found.notes:
        console.print(note, highlight=False, soft_wrap=True)
    console.print(_times(found))
    console.print(
        f"a step: {found.times.tokens_per_step:,} tokens at most, {found.times.flops_per_step / 1e12:,.1f} TFLOP",
        highlight=False,
    )


def _times(found: Forecast) -> Table:
    """Phases in steps' worth, hours, and what a rank receives of others; by engine where there are several ranks."""
    shared = found.plan.world_size > 1
    by_engine = found.hours_by_engine if shared else None
    engines = list(found.received) if shared else []
    hours = ["hours"] if found.hours else []
    titles = [f"{engine}: GiB received" for engine in engines]
    titles += [f"{engine}: hours at most" for engine in engines if by_engine]
    times = Table("phase", "steps' worth", *hours, *titles, title="time")
    for phase, count in found.times.steps.items():
        row = [f"{count:,.1f}", *([f"{found.hours[phase]:.2f}"] if found.hours else [])]
        row += [f"{found.received[engine].get(phase, 0) / GIB:,.0f}" for engine in engines]
        row += [f"{by_engine[engine][phase]:.2f}" for engine in engines] if by_engine else []
        times.add_row(phase, *row)
    return times


def proposal_told(found: Forecast) -> str:
    """The proposal in a line."""
    if found.memory is None:
        return "--memory GIB says how much a device has; then an engine is proposed that fits"
    best, least = found.proposal, found.least
    if best is None:
        assert least is not None, "what needs least is looked for where nothing fits"
        worst = max(least.phases, key=lambda phase: least.phases[phase])
        return (
            f"nothing fits into {_gib(found.memory)} GiB: {_settings(found, least)} needs {_gib(least.total)}, most of "
            f"all in its {worst}"
        )
    return f"fits into {_gib(found.memory)} GiB: {_settings(found, best)} ({_gib(best.total)} GiB)"


def remedies_told(found: Forecast) -> list[str]:
    """What would make it fit, a line each; nothing where something fits."""
    if found.least is None:
        return []
    if not any(remedy.fits for remedy in found.remedies):
        return ["no change of the keys that are tried makes it fit; take a smaller model"]
    lines = []
    for remedy in found.remedies:
        devices = [f"{count} devices" for key, count in remedy.changes.items() if key == "devices"]
        keys = [f"{key}={value}" for key, value in remedy.changes.items() if key != "devices"]
        settings = _settings(found, remedy.memory, changed=remedy.changes)
        lines.append(f"would fit with {' '.join([*devices, *keys])}: {settings} ({_gib(remedy.memory.total)} GiB)")
    return lines


def _settings(found: Forecast, best: EngineMemory, changed: Mapping[str, Any] = NOTHING) -> str:
    """The engine, and what a candidate has otherwise than the config."""
    config, changes = found.config, []
    share = config.train.batch_size // changed.get("devices", found.plan.world_size)
    if best.micro_batch_size != min(found.plan.micro_batch_size, share):
        changes.append(f"train.micro_batch_size={best.micro_batch_size}")
    if best.checkpointing != config.model.gradient_checkpointing:
        changes.append(f"model.gradient_checkpointing={str(best.checkpointing).lower()}")
    return " ".join([best.engine, *changes])


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
