"""What must be the same on a GPU: runs that were resumed, 4-bit layers, losses of few logits; and offloading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.on_gpu.measures import Report, block_ms, emptied, held_gb, peak_gb
from benchmarks.random_models import Shape, build, without_files
from benchmarks.steps import bare_steps
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.tasks.losses import token_cross_entropy

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("offloaded.py")


def resumed_of(report: Report, name: str, shape: Shape, folder: Path, *, deterministic: bool) -> None:
    """A run that went on, and the same from its checkpoint: losses of eight more steps."""
    section = {"name": f"resumed-{deterministic}", "output_dir": str(folder / "runs"), "deterministic": deterministic}
    run, checked = build(shape, folder, dtype="bf16", run=section)
    bare_steps(run, 4)
    run.save_checkpoint()
    expected = bare_steps(run, 8)
    run.engine.close()
    del run
    emptied()
    with without_files():
        again = build_run(checked, resume="auto")
    found = bare_steps(again, 8)
    again.engine.close()
    same = 100 * sum(a == b for a, b in zip(expected, found, strict=True)) / len(found)
    kernels = "deterministic kernels" if deterministic else "any kernels"
    what = f"resumed steps equal to the bit, {kernels}"
    report.add(8, name, what, same, "%", expected="100 %" if deterministic else "less than 100 % at times")
    worst = max(abs(a - b) for a, b in zip(expected, found, strict=True))
    report.add(8, name, f"largest difference of losses, {kernels}", worst, expected="0" if deterministic else "")


def packed_of(report: Report, name: str, run: Run, shape: Shape, options: Any) -> None:
    """The 4-bit layers' bytes, and what a pass takes to unpack them."""
    import bitsandbytes

    layers: Any = bitsandbytes.nn
    weights = [part.weight for part in run.engine.module.modules() if isinstance(part, layers.Linear4bit)]
    packed = sum(weight.numel() * weight.element_size() for weight in weights) / 1e9
    whole = f"3.2 GB for 32 layers (4.2 GB with embeddings and head); here {shape.share:.3g} of them"
    report.add(9, name, "packed weights", packed, "GB", expected=whole)
    report.add(9, name, "held", held_gb(), "GB")

    def unpack() -> None:
        for weight in weights:
            bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)

    expected = f"9 ms for 32 layers; here {shape.share:.3g} of them"
    report.add(9, name, "unpacking all layers once", block_ms(unpack, options.steps), "ms", expected=expected)


def logits_of(report: Report, name: str, *, rows: int, length: int, vocabulary: int, width: int, counted: int) -> None:
    """An output layer and its loss, forward and backward: all places by PyTorch's function, and ours of those counted.

    Args:
        counted: targets of a row, at its end.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = nn.Linear(width, vocabulary, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(rows, length, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.full((rows, length), -100, device=device)
    targets[:, -counted:] = torch.randint(vocabulary, (rows, counted), device=device)

    def naive() -> None:
        logits = head(hidden).float()
        nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()

    def ours() -> None:
        places = (targets.flatten() != -100).nonzero().squeeze(1)
        logits = head(hidden.flatten(0, 1).index_select(0, places))
        token_cross_entropy(logits, targets.flatten()[places]).mean().backward()

    held = held_gb()
    for what, work, expected in (("all logits", naive, "5 to 7 GB"), ("those counted, in parts", ours, "below 0.5 GB")):
        hidden.grad = None
        report.add(11, name, f"{what}: peak above what is held", peak_gb(work) - held, "GB", expected=expected)
        hidden.grad = None
        report.add(11, name, f"{what}: forward and backward", block_ms(work, 2), "ms")


def offloaded_of(report: Report, name: str, folder: Path, *, on_gpu: bool, seconds: float = 180) -> None:
    """ZeRO-3 with parameters and moments in CPU memory, one rank: an event, a resume, a step that is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = ROOT / "configs" / "accelerate" / ("zero3_offload.yaml" if on_gpu else "zero3.yaml")
    out = folder / "offloaded.json"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings)]
    command += ["--num_processes", "1", "--main_process_port", "0", str(SCRIPT), str(folder), str(out)]
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stdout[-500:])
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["engine"] == "zero3"
    report.add(10, name, "step", found["step_ms"], "ms")
    report.add(10, name, "rank event", found["event_ms"], "ms")
    report.add(10, name, "layers with another rank after it", found["changed"], expected="some")
    report.add(10, name, "resumed steps equal to the bit", 100 * found["same"], "%", expected="100 %")
    report.add(10, name, "steps with NaN left out, values as they were", found["left_out"], expected="1")
