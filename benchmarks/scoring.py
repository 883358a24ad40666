#!/usr/bin/env python3
"""What scoring a batch costs, as a ratio to a LoRA training step (forward and backward) on the same batch.

    python benchmarks/scoring.py --model DIR [--model DIR ...] --length 64 128

All rows are timed in turns in one run, and medians are compared, because machines are noisy. ``loop`` scores one sample
at a time by autograd and an in-place step; ``opacus`` (if it is installed) takes per-sample gradients and norms alone,
without loss reduction or sketch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from tsqlora_scale.model.adapters.lora import theta_modules
from tsqlora_scale.model.linear_layers import resolve_targets
from tsqlora_scale.quality.gradients.batch_memory import reuse_freed_memory
from tsqlora_scale.quality.gradients.per_sample import PerSampleGradients
from tsqlora_scale.quality.gradients.sketch import Sketch

ETA = 1e-3


class Batch:
    """Random tokens; every third sample is padded to half."""

    def __init__(self, model: nn.Module, size: int, length: int, device: str) -> None:
        config: Any = model.config
        ids = torch.randint(5, config.vocab_size - 5, (size, length), device=device)
        mask = torch.ones_like(ids)
        mask[::3, length // 2 :] = 0
        self.inputs = {"input_ids": ids, "attention_mask": mask}
        self.labels = torch.randint(0, 2, (size,), device=device)

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.labels)

    def to(self, device: Any) -> Batch:
        """It is where it is."""
        return self

    def single(self, i: int) -> Batch:
        """Sample ``i`` alone."""
        one = object.__new__(Batch)
        one.inputs = {name: tensor[i : i + 1] for name, tensor in self.inputs.items()}
        one.labels = self.labels[i : i + 1]
        return one


def losses(module: nn.Module, batch: Batch) -> Tensor:
    """(B,) cross-entropies."""
    return functional.cross_entropy(module(**batch.inputs).logits.float(), batch.labels, reduction="none")


def build(path: str, rank: int, device: str, dtype: torch.dtype) -> nn.Module:
    """The encoder with LoRA on all linear layers of its blocks, B not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=dtype)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=resolve_targets(base, "auto"), task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.to(device).eval()  # no dropout anywhere: the same arithmetic in every row


def norms_of(gradients: dict[str, Tensor]) -> Tensor:
    """(B,) norms over all factors."""
    norms: Tensor = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    return norms


def rows(model: nn.Module, batch: Batch) -> dict[str, Callable[[], Any]]:
    """Name -> what is timed."""
    sketch = Sketch(512, seed=0)
    parameters = [p for part in theta_modules(model).values() for p in part.parameters()]

    def step() -> Any:
        model.zero_grad()
        losses(model, batch).mean().backward()

    def score(exact: bool) -> Any:
        before, gradients = scorer.per_sample(losses, batch)
        result = [before, norms_of(gradients), sketch(gradients)]
        if exact:
            with scorer.stepped(gradients, ETA):
                result.append(before - losses(model, batch))
        return result

    def loop() -> Any:
        found = []
        for i in range(batch.size):
            one = batch.single(i)
            loss = losses(model, one).sum()
            gradients = torch.autograd.grad(loss, parameters)
            flat = torch.cat([g.flatten() for g in gradients])
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(ETA * gradient)
                after = losses(model, one).sum()
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.add_(ETA * gradient)
            found.append((loss - after, flat.norm(), flat))
        return found

    scorer = PerSampleGradients(model, theta_modules(model))

    def scored(exact: bool) -> Callable[[], float]:
        def timed() -> float:
            with scorer:  # a pass enters it once, so entering is not timed
                return timing(lambda: score(exact))

        return timed

    table: dict[str, Callable[[], float]] = {
        "LoRA training step": lambda: timing(step),
        "scoring, exact loss reduction": scored(True),
        "scoring, first order": scored(False),
        "loop, exact loss reduction": lambda: timing(loop),
    }
    return table


def opacus_row(path: str, rank: int, batch: Batch, device: str, dtype: torch.dtype) -> Callable[[], float] | None:
    """Opacus' per-sample gradients and norms, or None where it cannot."""
    try:
        from opacus import GradSampleModule
    except ImportError:
        return None
    model = build(path, rank, device, dtype)
    wanted = {id(p) for part in theta_modules(model).values() for p in part.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        wrapped = GradSampleModule(model).train()  # in evaluation mode it takes no gradients
    except Exception as error:
        print(f"opacus: {' '.join(str(error).split())[:200]}")
        return None

    def step() -> Any:
        for parameter in wrapped.parameters():
            parameter.grad_sample = None
        losses(wrapped, batch).mean().backward()
        per_sample = [p.grad_sample for p in wrapped.parameters() if p.requires_grad]
        return torch.stack([g.flatten(1).norm(dim=1) for g in per_sample]).norm(dim=0)

    return lambda: timing(step)


def timing(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Time all rows in turns and print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--length", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--loop-repeat", type=int, default=2, help="the loop is slow; 0 leaves it out")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        reuse_freed_memory()  # as a scoring pass does; the training step gets it, too
    dtype = getattr(torch, options.dtype)
    print(f"{device}, {torch.get_num_threads()} threads, {options.dtype}, batch {options.batch}, rank {options.rank}\n")
    print("| model | length | row | median ms | ratio | samples/s |")
    print("|---|---|---|---|---|---|")
    for path in options.model:
        model = build(path, options.rank, device, dtype)
        for length in options.length:
            batch = Batch(model, options.batch, length, device)
            table = rows(model, batch)
            opacus = opacus_row(path, options.rank, batch, device, dtype)
            if opacus is not None:
                table["opacus, gradients and norms"] = opacus
            times: dict[str, list[float]] = {name: [] for name in table}
            for turn in range(options.repeat + 1):
                for name, timed in table.items():
                    if name.startswith("loop") and turn > options.loop_repeat:
                        continue
                    seconds = timed()
                    if turn:  # the first turn warms up
                        times[name].append(seconds)
            base = statistics.median(times["LoRA training step"])
            for name, taken in times.items():
                if taken:
                    median = statistics.median(taken)
                    label = f"{path.rstrip('/').rsplit('/', 1)[-1]} | {length} | {name}"
                    print(f"| {label} | {median * 1e3:.0f} | {median / base:.2f} | {options.batch / median:.0f} |")


if __name__ == "__main__":
    main()
