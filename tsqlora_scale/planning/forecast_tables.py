"""The plan of a run, on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tsqlora_scale.planning.engine_memory import GIB, EngineMemory
from tsqlora_scale.planning.forecast import Forecast
from tsqlora_scale.report.score_tables import plain

#: What makes a phase need less.
REMEDIES = {
    "step": "lower task.max_length",
    "scoring": "lower scoring.batch_size or scoring.max_length",
    "evaluation": "lower train.eval_batch_size or task.num_beams",
}


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
    for note in found.notes:
        console.print(note, highlight=False, soft_wrap=True)
    times = Table("phase", "steps' worth", *(["hours"] if found.hours else []), title="time")
    for phase, count in found.times.steps.items():
        times.add_row(phase, f"{count:,.1f}", *([f"{found.hours[phase]:.2f}"] if found.hours else []))
    console.print(times)
    console.print(
        f"a step: {found.times.tokens_per_step:,} tokens at most, {found.times.flops_per_step / 1e12:,.1f} TFLOP",
        highlight=False,
    )


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
            f"all in its {worst}; {REMEDIES[worst]}, take more devices, model.quantization=nf4 or a smaller model"
        )
    return f"fits into {_gib(found.memory)} GiB: {_settings(found, best)} ({_gib(best.total)} GiB)"


def _settings(found: Forecast, best: EngineMemory) -> str:
    config, changes = found.config, []
    if best.micro_batch_size != found.plan.micro_batch_size:
        changes.append(f"train.micro_batch_size={best.micro_batch_size}")
    if best.checkpointing != config.model.gradient_checkpointing:
        changes.append(f"model.gradient_checkpointing={str(best.checkpointing).lower()}")
    return " ".join([best.engine, *changes])


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
