"""What steps, scores and rank events take on one GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.on_gpu.measures import Report, block_ms, held_gb, in_turns, kernel_ms, peak_gb, waits
from benchmarks.random_models import EVERY, Shape, random_base, selector_of
from benchmarks.steps import adapt, bare_step
from tsqlora_scale.model.linear_layers import resolve_targets
from tsqlora_scale.quality.gradients.sketch import Sketch
from tsqlora_scale.ranks.controller import AdaptiveRanks
from tsqlora_scale.run.preflight import Preflight
from tsqlora_scale.run.training_run import Run

#: What two numbers of one sample may differ by in bf16, as a pass takes them for equal: 12 roundings.
TOLERANCE = 12 * 2.0**-7


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

    return step


def steps_of(report: Report, name: str, run: Run, checked: Preflight, shape: Shape, options: Any) -> None:
    """A step beside the plain loop, listened to and not."""
    dtype = run.config.model.dtype
    quiet, listened = step_at(run, listened=False), step_at(run, listened=True)
    rows = {"plain PEFT loop": plain_loop(run, checked, shape, dtype), "step": quiet, "listened step": listened}
    found = in_turns(rows, count=options.steps, repeats=options.repeats)
    number = 4 if shape.is_causal else 5
    least = {"BERT-base shapes fp32": "28 ms at least", "BERT-base shapes bf16": "3 ms at least, 35 to 50 by the wall"}
    for what, taken in found.items():
        report.add(number, name, what, taken, "ms", expected=least.get(name, "") if what == "step" else "")
    report.add(number, name, "step to plain loop", found["step"] / found["plain PEFT loop"], "times", expected="1")
    report.add(number, name, "samples", 1e3 * shape.batch / found["step"], "per s")
    tokens = run.task.batch(run.selector.draw(0)).inputs["input_ids"].numel()
    report.add(number, name, "tokens", 1e3 * tokens / found["step"], "per s")
    drawn = block_ms(lambda: run.task.batch(run.selector.draw(1)), options.steps)
    report.add(5, name, "drawing and tokenising, beside the step", drawn, "ms", expected="5 to 8 ms for 32 x 128")
    of_all = f"450 to 550 ms for 32 layers; here {shape.share:.3g} of them" if shape.is_causal else ""
    report.add(7, name, "more in a listened step", found["listened step"] - found["step"], "ms", expected=of_all)


def busy_of(report: Report, name: str, run: Run, options: Any) -> None:
    """How long the GPU computes in a step, and what the host waits for."""
    step = step_at(run, listened=False)
    places = waits(step)
    where = ", ".join(f"{count} {place}" for place, count in places.most_common(6))
    report.add(3, name, f"waits in a step ({where})", places.total(), expected="1, and the model's own")
    if torch.cuda.is_available():
        taken, busy = block_ms(step, options.steps), kernel_ms(step, 3)
        report.add(5, name, "kernels of a step", busy, "ms")
        report.add(5, name, "GPU busy", 100 * busy / taken, "%")


def scores_of(report: Report, name: str, run: Run, checked: Preflight, shape: Shape, options: Any) -> None:
    """A pass by first order and exact, a sample, against a step's; and memory."""
    step = step_at(run, listened=False)
    per_step = block_ms(step, options.steps) / shape.batch
    rows = len(run.task)
    is_checkpointed = run.config.model.gradient_checkpointing
    for kind, size in (("first_order", shape.batch), ("exact", shape.batch), ("first_order", "auto")):
        what = f"pass, {kind}, batch {size}"
        selector = selector_of(
            run, checked, what.replace(", ", "-").replace(" ", "-"), delta_loss=kind, batch_size=size
        )
        taken: list[float] = []
        peak = peak_gb(lambda: taken.append(block_ms(lambda: selector.score(run.engine.module, 1), 1)))  # noqa: B023
        reckoned = {"first_order": "0.67" if is_checkpointed else "1.0", "exact": "1.0" if is_checkpointed else "1.5"}
        report.add(4, name, f"{what}, checks included, a sample", taken[0] / rows, "ms")
        report.add(4, name, f"{what}, to a step's sample", taken[0] / rows / per_step, "times", expected=reckoned[kind])
        report.add(1, name, f"{what}, peak", peak, "GB")
    report.add(1, name, "peak of a step", peak_gb(step), "GB")
    report.add(1, name, "peak of a listened step", peak_gb(step_at(run, listened=True)), "GB")


def memory_of(report: Report, name: str, run: Run, checked: Preflight, shape: Shape) -> None:
    """What a sample more in a scoring batch takes."""
    held, peaks = held_gb(), {}
    for size in (1, 2, 4):
        selector = selector_of(run, checked, f"of-{size}", batch_size=size, max_samples=8, delta_loss="first_order")
        peaks[size] = peak_gb(lambda: selector.score(run.engine.module, 1)) - held  # noqa: B023
        report.add(1, name, f"scoring a batch of {size}, above what is held", peaks[size], "GB")
    expected = f"below {0.5 * shape.share:.3g} GB (0.5 for 32 layers, checkpointed)"
    report.add(1, name, "a sample more", (peaks[4] - peaks[1]) / 3, "GB", expected=expected)


def batches_of(report: Report, name: str, run: Run, checked: Preflight, *, tolerance: float = TOLERANCE) -> None:
    """Scores in batches against those alone, of some samples: by a loop of one at a time."""
    number = 2 if run.config.model.dtype == "bf16" else 8
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
        within = 100 * float(np.mean(off <= tolerance))
        report.add(number, name, f"{key}: batched within {tolerance:.2g} of alone", within, "%", expected="100 %")
        report.add(number, name, f"{key}: median difference", float(np.median(off)))


def rounding_of(report: Report, name: str, run: Run, checked: Preflight) -> None:
    """Samples whose exact loss reduction stands out of bf16's rounding, as a pass decides it."""
    selector = selector_of(run, checked, "exact", batch_size=4, max_samples=32, delta_loss="exact")
    selector.score(run.engine.module, 1)
    assert selector.table is not None
    known = selector.table.scoring_pass >= 0
    reduction, loss = (np.asarray(getattr(selector.table, key)[known]) for key in ("delta_loss", "loss"))
    beyond = 100 * float(np.mean(np.abs(reduction) > 16 * 2.0**-7 * np.abs(loss)))
    report.add(2, name, "loss reductions above 16 roundings", beyond, "%", expected="0 %")


def event_of(report: Report, name: str, run: Run, shape: Shape) -> None:
    """A rank event, what follows it, and memory after some."""
    before, of_all = held_gb(), f"1,300 ms for 32 layers and r 16; here {shape.share:.3g} of them"
    step_at(run, listened=True)()
    run.step = EVERY
    expected = of_all if shape.is_causal else ""
    report.add(7, name, "rank event", block_ms(lambda: adapt(run), 1), "ms", expected=expected)
    for what in ("second", "third"):
        report.add(7, name, f"rank event, {what}", block_ms(lambda: adapt(run), 1), "ms")
    report.add(7, name, "first step after an event", block_ms(step_at(run, listened=False), 1), "ms")
    places = waits(step_at(run, listened=False))
    report.add(3, name, "waits in a step after an event", places.total(), expected="1, and the model's own")
    report.add(7, name, "more held after three events", held_gb() - before, "GB", expected="0 GB")


def sketch_of(report: Report, name: str, run: Run, options: Any) -> None:
    """The sketch of one sample's gradient, of all factors."""
    factors = {
        key: torch.randn(1, *value.shape, device=value.device)
        for key, value in run.engine.module.named_parameters()
        if value.requires_grad and value.dim() == 2
    }
    sketch = Sketch(512, seed=0)
    sketch(factors)
    number = sum(factor.numel() for factor in factors.values()) / 1e6
    taken = block_ms(lambda: sketch(factors), options.steps)
    report.add(7, name, f"sketch of {number:.3g} million numbers", taken, "ms", expected="0.3 ms for 40 million")


def casts_of(report: Report, name: str, run: Run, options: Any) -> None:
    """A step without PEFT's casts of adapters' inputs to float32, which autocast undoes."""
    layers: list[Any] = [part for part in run.engine.module.modules() if hasattr(part, "cast_input_dtype_enabled")]
    step = step_at(run, listened=False)
    default = [part.cast_input_dtype_enabled for part in layers]

    def with_casts(enabled: bool) -> Callable[[], float]:
        def timed() -> float:
            for part in layers:
                part.cast_input_dtype_enabled = enabled
            return step()

        return timed

    found = in_turns({"on": with_casts(True), "off": with_casts(False)}, count=options.steps, repeats=2)
    saved = "17 ms of 120 less in the forward pass of 32 layers"
    report.add(6, name, "step without casts of inputs, to one with them", found["off"] / found["on"], "times",
               expected=saved)  # fmt: skip
    for part, value in zip(layers, default, strict=True):
        part.cast_input_dtype_enabled = value
