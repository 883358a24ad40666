#!/usr/bin/env python3
"""What a run costs on a GPU, by parts, each with the figure that reckoning gives for an H100 beside the one seen.

    python benchmarks/gpu.py --out DIR [--only 1,4,11] [--budget 470]
    python benchmarks/gpu.py --out DIR --smoke          on any machine, in a minute: whether it still runs

Models have real shapes and random weights, and are made on the GPU; nothing is fetched. The table is printed, and
``DIR/gpu.json`` is written after every section. A section that is not expected to end within the budget (seconds) is
left out, one that fails says why, and the exit code is 1 then. On a CPU waits and memory are 0. Measured are:

     1  memory of scoring: what a sample more in a batch takes
     2  scores in bf16: batches against samples alone, and what the exact loss reduction is worth
     3  how often the host waits for the GPU
     4  a pass over samples against training steps on them, with checkpointed activations too
     5  encoders' steps in fp32, TF32 and bf16, and tokenising beside them
     6  casts of adapters' inputs
     7  steps that are listened to, rank events, the sketch
     8  runs that were resumed, to the bit; scores in fp32 against a loop
     9  4-bit weights
    10  ZeRO-3 with everything in CPU memory, one rank
    11  logits of a large vocabulary
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# cuBLAS gives the same bits again with this alone; it is read once in a process
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tsqlora_scale.common.quiet import prepare_environment, quiet_libraries

prepare_environment()

import torch

from benchmarks.on_gpu import state_parts, step_parts
from benchmarks.on_gpu.measures import Report, emptied, in_turns
from benchmarks.on_gpu.step_parts import step_at
from benchmarks.random_models import Shape, build, encoder, llama, without_files, write_folder
from tsqlora_scale.engine.arithmetic import set_arithmetic

#: Section -> seconds that it is expected to take on an H100, and the measurements that it makes.
SECTIONS: dict[str, tuple[float, set[int]]] = {
    "llama": (40.0, {1, 2, 3, 4, 6, 7}),
    "bert": (25.0, {3, 5, 7, 8}),
    "logits": (10.0, {11}),
    "nf4": (25.0, {3, 4, 7, 9}),
    "checkpointed": (30.0, {1, 4}),
    "resumed": (25.0, {8}),
    "minilm": (20.0, {2, 3, 4, 5, 7}),
    "offloaded": (90.0, {10}),
}


def of_encoder(report: Report, shape: Shape, folder: Path, options: Any) -> None:
    """fp32, TF32 and bf16."""
    write_folder(shape, folder, options.rows)
    for dtype in ("fp32", "bf16"):
        run, checked = build(shape, folder, dtype=dtype)
        name = f"{shape.name} {dtype}"
        parts: list[partial[None]] = [
            partial(step_parts.steps_of, report, name, run, checked, shape, options),
            partial(step_parts.busy_of, report, name, run, options),
        ]
        if dtype == "bf16":
            parts += [
                partial(step_parts.scores_of, report, name, run, checked, shape, options),
                partial(step_parts.batches_of, report, name, run, checked),
                partial(step_parts.event_of, report, name, run, shape),
            ]
        else:
            parts.append(partial(step_parts.batches_of, report, name, run, checked, tolerance=1e-4))
        report.attempt(parts, name)
        if dtype == "fp32" and torch.cuda.is_available():
            set_arithmetic(deterministic=False, tf32=True)
            taken = in_turns({"step": step_at(run, listened=False)}, count=options.steps, repeats=2)["step"]
            least = "5 ms at least" if shape.name.startswith("BERT") else ""
            report.add(5, f"{shape.name} tf32", "step", taken, "ms", expected=least)
            set_arithmetic(deterministic=False, tf32=False)
        run.engine.close()
        del run


def of_llama(
    report: Report, shape: Shape, folder: Path, options: Any, *, quantization: str = "none", checkpoints: bool = False
) -> None:
    """Dense, packed into 4 bits, or with activations that are computed again."""
    write_folder(shape, folder, options.rows)
    name = f"{shape.name} {'nf4' if quantization == 'nf4' else 'bf16'}{' checkpointed' if checkpoints else ''}"
    start = time.perf_counter()
    model = {"quantization": quantization, "gradient_checkpointing": checkpoints}
    run, checked = build(shape, folder, dtype="bf16", model=model)
    report.add(0, name, "load", time.perf_counter() - start, "s")
    report.add(0, name, "parameters", sum(p.numel() for p in run.engine.module.parameters()) / 1e9, "1e9")
    scores = partial(step_parts.scores_of, report, name, run, checked, shape, options)
    memory = partial(step_parts.memory_of, report, name, run, checked, shape)
    if checkpoints:
        report.attempt([memory, scores], name)
    else:
        parts: list[partial[None]] = [
            partial(step_parts.steps_of, report, name, run, checked, shape, options),
            partial(step_parts.busy_of, report, name, run, options),
        ]
        if quantization == "nf4":
            parts.append(partial(state_parts.packed_of, report, name, run, shape, options))
        else:
            parts += [
                memory,
                partial(step_parts.batches_of, report, name, run, checked),
                partial(step_parts.rounding_of, report, name, run, checked),
                partial(step_parts.casts_of, report, name, run, options),
                partial(step_parts.sketch_of, report, name, run, options),
            ]
        parts += [scores, partial(step_parts.event_of, report, name, run, shape)]
        report.attempt(parts, name)
    run.engine.close()


def of_resumed(report: Report, shape: Shape, folder: Path, options: Any) -> None:
    """Any kernels, then such as give the same bits again."""
    write_folder(shape, folder, options.rows)
    for deterministic in (False, True):
        part = partial(state_parts.resumed_of, report, shape.name, shape, folder, deterministic=deterministic)
        report.attempt([part], shape.name)
    set_arithmetic(deterministic=False, tf32=False)


def sections_of(options: Any) -> dict[str, Callable[[Report, Path], None]]:
    """Name -> what is measured."""
    if options.smoke:
        small = {"batch": 4, "length": 16}
        minilm = encoder("tiny", hidden=32, layers=2, heads=4, **small)
        bert = encoder("tiny wide", hidden=64, layers=2, heads=4, **small)
        causal = llama("tiny Llama, 2 of 4 layers,", hidden=64, inner=128, layers=2, of=4, heads=4, **small)
        logits = {"rows": 2, "length": 64, "vocabulary": 1000, "width": 16, "counted": 8}
    else:
        minilm = encoder("MiniLM shapes", hidden=384, layers=6, heads=12)
        bert = encoder("BERT-base shapes", hidden=768, layers=12, heads=12)
        sizes = {"hidden": 4096, "inner": 11008, "layers": 8, "of": 32, "heads": 32}
        causal = llama("7B Llama shapes, 8 of 32 layers,", **sizes, batch=4, length=512)
        logits = {"rows": 4, "length": 1024, "vocabulary": 128_000, "width": 4096, "counted": 64}
    on_gpu = torch.cuda.is_available() and not options.smoke
    return {
        "llama": lambda report, folder: of_llama(report, causal, folder, options),
        "bert": lambda report, folder: of_encoder(report, bert, folder, options),
        "logits": lambda report, _: state_parts.logits_of(report, "logits", **logits),
        "nf4": lambda report, folder: of_llama(report, causal, folder, options, quantization="nf4"),
        "checkpointed": lambda report, folder: of_llama(report, causal, folder, options, checkpoints=True),
        "resumed": lambda report, folder: of_resumed(report, minilm, folder, options),
        "minilm": lambda report, folder: of_encoder(report, minilm, folder, options),
        "offloaded": lambda report, folder: state_parts.offloaded_of(report, "offloaded", folder, on_gpu=on_gpu),
    }


def chosen(options: Any) -> list[str]:
    """Sections that make one of the measurements that are asked for."""
    asked = {int(number) for number in options.only.split(",")} if options.only else set(range(1, 12))
    names = options.sections.split(",") if options.sections else list(SECTIONS)
    return [name for name, (_, numbers) in SECTIONS.items() if name in names and numbers & asked]


def main() -> int:
    """Measure the sections in order, as far as the budget goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="numbers of measurements, with commas; none: all")
    parser.add_argument("--sections", default="", help=f"of {', '.join(SECTIONS)}; none: all")
    parser.add_argument("--budget", type=float, default=470.0, help="seconds")
    parser.add_argument("--steps", type=int, default=10, help="in a block")
    parser.add_argument("--repeats", type=int, default=3, help="blocks")
    parser.add_argument("--rows", type=int, default=128, help="of the pool")
    parser.add_argument("--smoke", action="store_true", help="tiny models, one step: whether all of it runs")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.repeats, options.rows = 1, 1, 24
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    report = Report(options.out / "gpu.json")
    print(f"{report.about['device']}, torch {report.about['torch']}\n")
    print("| | section | what | expected of an H100 | seen |\n|---|---|---|---|---|")
    measures = sections_of(options)
    for name in chosen(options):
        before = time.perf_counter() - started
        if not options.smoke and before + SECTIONS[name][0] > options.budget:
            left = options.budget - before
            print(f"{name} is left out: it takes {SECTIONS[name][0]:.0f} s, and {left:.0f} are left", flush=True)
            continue
        try:
            with tempfile.TemporaryDirectory() as folder, quiet_libraries(), without_files():
                measures[name](report, Path(folder) / name)
        except Exception as error:
            report.note_failure(name, error)
        emptied()
        report.add(0, name, "seconds of the section", time.perf_counter() - started - before, "s")
        report.write(seconds=time.perf_counter() - started)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
