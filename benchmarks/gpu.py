#!/usr/bin/env python3
"""What a run costs on a GPU, by parts: steps beside a plain PEFT loop, scores, rank events, memory, waits.

    python benchmarks/gpu.py --out DIR [--sections minilm,bert,llama,nf4] [--budget 100]

Models have real shapes and random weights, and are made on the GPU. The table is printed, and ``DIR/gpu.json`` is
written after every section. A section that is not expected to end within the budget (seconds) is left out, one that
fails says why. On a CPU everything but waits and memory is measured, too; ``--tiny`` is for trying it out.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tsqlora_scale.common.quiet import prepare_environment, quiet_libraries

prepare_environment()

import numpy as np
import torch

from benchmarks.random_models import EVERY, Shape, build, encoder, llama, selector_of, without_files, write_folder
from benchmarks.steps import adapt, bare_step
from tsqlora_scale.engine.arithmetic import set_arithmetic
from tsqlora_scale.model.base_model import DTYPES
from tsqlora_scale.model.linear_layers import resolve_targets
from tsqlora_scale.ranks.controller import AdaptiveRanks
from tsqlora_scale.run.preflight import Preflight
from tsqlora_scale.run.training_run import Run

#: What two numbers of one sample may differ by in bf16, as a pass takes them for equal: 12 roundings.
TOLERANCE = 12 * 2.0**-7
#: Section -> seconds that it is expected to take on an H100.
EXPECTED = {"llama": 35.0, "bert": 22.0, "minilm": 18.0, "nf4": 20.0}


class Report:
    """Rows of section, what, number and unit."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.rows: list[dict[str, Any]] = []
        properties = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
        self.about = {
            "device": properties.name if properties else "cpu",
            "torch": torch.__version__,
            "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        }

    def add(self, section: str, what: str, value: float, unit: str = "") -> None:
        """Add and print a row."""
        self.rows.append({"section": section, "what": what, "value": float(value), "unit": unit})
        print(f"| {section} | {what} | {value:.4g} {unit} |", flush=True)

    def attempt(self, parts: list[partial[None]]) -> None:
        """Measure one part after another; one that fails says why."""
        for part in parts:
            try:
                part()
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
                print(f"{part.func.__name__} has failed: {reason}", flush=True)
                self.about[f"{part.func.__name__} of {part.args[1]}"] = reason

    def write(self, **more: Any) -> None:
        """All that is known so far."""
        self._file.write_text(json.dumps({**self.about, **more, "rows": self.rows}, indent=1) + "\n", encoding="utf-8")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def block_ms(step: Callable[[], Any], count: int) -> float:
    """Milliseconds of a call, of ``count`` in a row."""
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    return 1e3 * (time.perf_counter() - start) / count


def in_turns(steps: dict[str, Callable[[], Any]], *, count: int, repeats: int) -> dict[str, float]:
    """Medians of blocks that are timed in turns, after one that is not counted."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            taken = block_ms(step, count if repeat else 2)
            if repeat:
                found[name].append(taken)
    return {name: statistics.median(values) for name, values in found.items()}


def kernel_ms(step: Callable[[], Any], count: int) -> float:
    """Milliseconds in which the GPU computes, by its own clock, in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            step()
        synchronize()
    return float(sum(event.self_device_time_total for event in profile.key_averages())) / 1e3 / count


def peak_gb(work: Callable[[], Any]) -> float:
    """Most that the allocator holds during a call, 1e9 bytes; 0 on a CPU."""
    if not torch.cuda.is_available():
        work()
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


def waits(step: Callable[[], Any]) -> collections.Counter[str]:
    """Places where the host waits for the GPU in a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return collections.Counter(
        f"{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}"
        for w in caught
        if "synchronizing CUDA operation" in str(w.message)
    )


def step_at(run: Run, *, listened: bool) -> Callable[[], float]:
    """A step of the loop at a place of the schedule that is listened to, or is not."""
    assert isinstance(run.ranks, AdaptiveRanks)
    tracker = run.ranks.tracker
    place = next(step for step in range(EVERY, 0, -1) if tracker.listens(step) == listened)

    def step() -> float:
        run.step = place
        return bare_step(run)

    return step


def plain_loop(run: Run, checked: Preflight, shape: Shape, dtype: str) -> Callable[[], None]:
    """PEFT and PyTorch alone, the same adapter, on batches that were tokenised before; nothing is read back."""
    from peft import LoraConfig, get_peft_model

    from benchmarks.random_models import random_base

    device = run.engine.world.device
    base, heads = random_base(checked, device=device)
    lora = LoraConfig(
        r=shape.rank, lora_alpha=2 * shape.rank, target_modules=resolve_targets(base, "auto"),
        modules_to_save=heads or None, task_type=run.task.peft_task_type,
    )  # fmt: skip
    model = get_peft_model(base, lora).to(device).train()
    params = [p for p in model.parameters() if p.requires_grad]
    for param in params:
        param.data = param.data.float()
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=device.type == "cuda")
    batches = [run.task.batch(run.selector.draw(number)) for number in range(4)]
    turn = iter(range(10**9))

    def step() -> None:
        batch = batches[next(turn) % len(batches)].to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16"):
            logits = model(**batch.inputs).logits
        sums, terms = run.task._objective.losses(logits, batch.targets)
        (sums.sum() / terms.sum()).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    del base
    assert DTYPES[dtype] is not None
    return step


def steps_of(report: Report, name: str, run: Run, checked: Preflight, shape: Shape, options: Any) -> None:
    """A step beside the plain loop, listened to and not."""
    dtype = run.config.model.dtype
    quiet, listened = step_at(run, listened=False), step_at(run, listened=True)
    rows = {"plain PEFT loop": plain_loop(run, checked, shape, dtype), "step": quiet, "listened step": listened}
    found = in_turns(rows, count=options.steps, repeats=options.repeats)
    for what, taken in found.items():
        report.add(name, what, taken, "ms")
    report.add(name, "step to plain loop", found["step"] / found["plain PEFT loop"], "times")
    report.add(name, "samples", 1e3 * shape.batch / found["step"], "per s")
    tokens = run.task.batch(run.selector.draw(0)).inputs["input_ids"].numel()
    report.add(name, "tokens", 1e3 * tokens / found["step"], "per s")
    drawn = block_ms(lambda: run.task.batch(run.selector.draw(1)), options.steps)
    report.add(name, "drawing and tokenising, of the step", drawn, "ms")


def busy_of(report: Report, name: str, run: Run, options: Any) -> None:
    """How long the GPU computes in a step, and what it waits for."""
    if not torch.cuda.is_available():
        return
    step = step_at(run, listened=False)
    places = waits(step)
    where = ", ".join(f"{count} {place}" for place, count in places.most_common(6))
    report.add(name, f"waits in a step ({where})", places.total())
    taken, busy = block_ms(step, options.steps), kernel_ms(step, 3)
    report.add(name, "kernels of a step", busy, "ms")
    report.add(name, "GPU busy", 100 * busy / taken, "%")


def scores_of(report: Report, name: str, run: Run, checked: Preflight, shape: Shape, options: Any) -> None:
    """A pass by first order and exact, a sample, against a step's; and memory."""
    step = step_at(run, listened=False)
    per_step = block_ms(step, options.steps) / shape.batch
    rows = len(run.task)
    for kind, size in (("first_order", shape.batch), ("exact", shape.batch), ("first_order", "auto")):
        what = f"pass, {kind}, batch {size}"
        selector = selector_of(
            run, checked, what.replace(", ", "-").replace(" ", "-"), delta_loss=kind, batch_size=size
        )
        taken: list[float] = []
        peak = peak_gb(lambda: taken.append(block_ms(lambda: selector.score(run.engine.module, 1), 1)))  # noqa: B023
        report.add(name, f"{what}, checks included, a sample", taken[0] / rows, "ms")
        report.add(name, f"{what}, to a step's sample", taken[0] / rows / per_step, "times")
        report.add(name, f"{what}, peak", peak, "GB")
    report.add(name, "peak of a step", peak_gb(step), "GB")
    report.add(name, "peak of a listened step", peak_gb(step_at(run, listened=True)), "GB")


def batches_of(report: Report, name: str, run: Run, checked: Preflight) -> None:
    """Scores in batches against those alone, of some samples."""
    tables = []
    for size in (16, 1):
        selector = selector_of(run, checked, f"by-{size}", batch_size=size, max_samples=32, delta_loss="first_order")
        selector.score(run.engine.module, 1)
        assert selector.table is not None
        known = selector.table.scoring_pass >= 0
        tables.append({key: getattr(selector.table, key)[known] for key in ("loss", "grad_norm", "convergence")})
    for key in ("loss", "grad_norm", "convergence"):
        together, alone = (table[key] for table in tables)
        off = np.abs(together - alone) / np.maximum(np.abs(alone), 1e-3)
        report.add(
            name, f"{key}: batched within {100 * TOLERANCE:.1f} % of alone", 100 * np.mean(off <= TOLERANCE), "%"
        )
        report.add(name, f"{key}: median difference", 100 * float(np.median(off)), "%")


def event_of(report: Report, name: str, run: Run, shape: Shape) -> None:
    """A rank event, and memory after it."""
    step_at(run, listened=True)()
    run.step = EVERY
    report.add(name, "rank event", block_ms(lambda: adapt(run), 1), "ms")
    report.add(name, "rank event, second", block_ms(lambda: adapt(run), 1), "ms")
    if shape.share < 1:
        report.add(name, "layers, of those of the model", 100 * shape.share, "%")
    report.add(name, "first step after an event", block_ms(step_at(run, listened=False), 1), "ms")


def casts_of(report: Report, name: str, run: Run, options: Any) -> None:
    """A step without PEFT's casts of adapters' inputs to float32, which autocast undoes."""
    layers: list[Any] = [part for part in run.engine.module.modules() if hasattr(part, "cast_input_dtype_enabled")]
    step = step_at(run, listened=False)

    def with_casts(enabled: bool) -> Callable[[], float]:
        def timed() -> float:
            for part in layers:
                part.cast_input_dtype_enabled = enabled
            return step()

        return timed

    found = in_turns({"on": with_casts(True), "off": with_casts(False)}, count=options.steps, repeats=2)
    report.add(name, "step without casts of inputs, to one with them", found["off"] / found["on"], "times")
    for part in layers:
        part.cast_input_dtype_enabled = True


def of_encoder(report: Report, shape: Shape, folder: Path, options: Any) -> None:
    """fp32, TF32 and bf16."""
    write_folder(shape, folder, options.rows)
    for dtype in ("fp32", "bf16"):
        run, checked = build(shape, folder, dtype=dtype)
        name = f"{shape.name} {dtype}"
        parts = [
            partial(steps_of, report, name, run, checked, shape, options),
            partial(busy_of, report, name, run, options),
        ]
        if dtype == "bf16":
            parts += [
                partial(scores_of, report, name, run, checked, shape, options),
                partial(batches_of, report, name, run, checked),
                partial(event_of, report, name, run, shape),
            ]
        report.attempt(parts)
        if dtype == "fp32" and torch.cuda.is_available():
            set_arithmetic(deterministic=False, tf32=True)
            taken = in_turns({"step": step_at(run, listened=False)}, count=options.steps, repeats=2)["step"]
            report.add(f"{shape.name} tf32", "step", taken, "ms")
            set_arithmetic(deterministic=False, tf32=False)
        run.engine.close()
        del run


def of_llama(report: Report, shape: Shape, folder: Path, options: Any, *, quantization: str = "none") -> None:
    """Dense, or packed into 4 bits."""
    write_folder(shape, folder, options.rows)
    name = f"{shape.name} {'nf4' if quantization == 'nf4' else 'bf16'}"
    start = time.perf_counter()
    run, checked = build(shape, folder, dtype="bf16", model={"quantization": quantization})
    report.add(name, "load", time.perf_counter() - start, "s")
    report.add(name, "parameters", sum(p.numel() for p in run.engine.module.parameters()) / 1e9, "1e9")
    parts = [
        partial(steps_of, report, name, run, checked, shape, options),
        partial(busy_of, report, name, run, options),
        partial(scores_of, report, name, run, checked, shape, options),
        partial(event_of, report, name, run, shape),
    ]
    if quantization == "none":
        parts[2:2] = [partial(batches_of, report, name, run, checked), partial(casts_of, report, name, run, options)]
    report.attempt(parts)
    run.engine.close()


def sections_of(options: Any) -> dict[str, Callable[[Report, Path], None]]:
    """Name -> what is measured."""
    if options.tiny:
        small = {"batch": 4, "length": 16}
        minilm = encoder("tiny", hidden=32, layers=2, heads=4, **small)
        bert = encoder("tiny wide", hidden=64, layers=2, heads=4, **small)
        causal = llama("tiny Llama, 2 of 4 layers", hidden=64, inner=128, layers=2, of=4, heads=4, **small)
    else:
        minilm = encoder("MiniLM shapes", hidden=384, layers=6, heads=12)
        bert = encoder("BERT-base shapes", hidden=768, layers=12, heads=12)
        sizes = {"hidden": 4096, "inner": 11008, "layers": 8, "of": 32, "heads": 32}
        causal = llama("7B Llama shapes, 8 of 32 layers,", **sizes, batch=4, length=512)
    return {
        "llama": lambda report, folder: of_llama(report, causal, folder, options),
        "bert": lambda report, folder: of_encoder(report, bert, folder, options),
        "minilm": lambda report, folder: of_encoder(report, minilm, folder, options),
        "nf4": lambda report, folder: of_llama(report, causal, folder, options, quantization="nf4"),
    }


def main() -> None:
    """Measure the sections in order, as far as the budget goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sections", default=",".join(EXPECTED))
    parser.add_argument("--budget", type=float, default=100.0, help="seconds")
    parser.add_argument("--steps", type=int, default=10, help="in a block")
    parser.add_argument("--repeats", type=int, default=3, help="blocks")
    parser.add_argument("--rows", type=int, default=128, help="of the pool")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    report = Report(options.out / "gpu.json")
    print(f"{report.about['device']}, torch {report.about['torch']}\n\n| section | what | number |\n|---|---|---|")
    for name, measure in sections_of(options).items():
        if name not in options.sections.split(","):
            continue
        before = time.perf_counter() - started
        if not options.tiny and before + EXPECTED[name] > options.budget:
            print(f"{name} is left out: it takes {EXPECTED[name]:.0f} s, and {options.budget - before:.0f} are left")
            continue
        try:
            with tempfile.TemporaryDirectory() as folder, quiet_libraries(), without_files():
                measure(report, Path(folder) / name)
        except Exception as error:
            print(f"{name} has failed: {type(error).__name__}: {' '.join(str(error).split())[:600]}", flush=True)
            report.about[f"{name} failed"] = repr(error)[:2000]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        report.add(name, "seconds of the section", time.perf_counter() - started - before, "s")
        report.write(seconds=time.perf_counter() - started)


if __name__ == "__main__":
    main()
