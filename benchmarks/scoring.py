#!/usr/bin/env python3
"""What scoring a batch costs, as a ratio to a LoRA training step (forward and backward) on the same batch.

    python benchmarks/scoring.py --model DIR [--model DIR ...] --length 64 128

All rows are timed in turns in one run, and medians are compared, because machines are noisy. A row that cannot run
on a model is left out, with its reason. ``--rank 8 64`` also shows by which row memory grows with theta: kept MB are
what autograd keeps for the backward pass and the gradients that are there at once, a sample, without parameters.

``loop``: one sample at a time by autograd, as DataFlex's and LESS' selectors do it, with the same norms and sketches as
ours; and with the loss after an in-place step. ``vmap(grad)``: per-sample gradients by torch.func. ``opacus``:
per-sample gradients and norms. The last two hold every gradient of the batch.

``ghost products``: what GhostSuite and GREATS (Wang et al. 2024) do within a training step, rebuilt from their papers:
a held-out batch goes through the same forward and backward; for each module the products of per-sample gradients are
``sum over t, t' of (delta_it . delta_jt') (x_it . x_jt')``, without forming a gradient, or of gradients where that is
cheaper. GhostSuite's are with the held-out batch, GREATS' among the training samples, too. They are relative to the
batch, so they rank its samples, and no pool.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from tsqlora_scale.model.adapters.lora import theta_modules
from tsqlora_scale.model.linear_layers import resolve_targets
from tsqlora_scale.quality.gradients.batch_memory import bytes_kept, reuse_freed_memory
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
        return self.of({name: tensor[i : i + 1] for name, tensor in self.inputs.items()}, self.labels[i : i + 1])

    def joined(self, other: Batch) -> Batch:
        """Both, one after the other."""
        inputs = {name: torch.cat([tensor, other.inputs[name]]) for name, tensor in self.inputs.items()}
        return self.of(inputs, torch.cat([self.labels, other.labels]))

    @staticmethod
    def of(inputs: dict[str, Tensor], labels: Tensor) -> Batch:
        """Of given tensors."""
        made = object.__new__(Batch)
        made.inputs, made.labels = inputs, labels
        return made


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


def rows(model: nn.Module, batch: Batch, held_out: Batch) -> tuple[dict[str, Callable[[], float]], dict[str, int]]:
    """Name -> what is timed; name -> bytes."""
    sketch = Sketch(512, seed=0)
    parameters = [p for part in theta_modules(model).values() for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)  # the model stays the same in all rows
    scorer = PerSampleGradients(model, theta_modules(model))

    def step(whole: bool = False) -> Any:
        model.zero_grad()
        losses(model, batch).mean().backward()
        if whole:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    def exact() -> Any:
        before, gradients = scorer.per_sample(losses, batch)
        found = [before, norms_of(gradients), sketch(gradients)]
        with scorer.stepped(gradients, ETA):
            return [*found, before - losses(model, batch)]

    ours: dict[str, Callable[[], Any]] = {
        "scoring, exact loss reduction": exact,
        "scoring, first order": lambda: scorer.folded(losses, batch, sketch=sketch),
        "scoring, first order, norms alone": lambda: scorer.folded(losses, batch, sketch=None),
        "scoring, losses alone": lambda: scorer.losses_alone(losses, batch),
    }
    others: dict[str, Callable[[], Any]] = {
        "LoRA training step": step,
        "LoRA training step, clipping and AdamW too": lambda: step(True),
        "loop, exact loss reduction": loop(model, batch, eta=ETA),
        "loop, first order (DataFlex)": loop(model, batch, eta=None),
        "vmap(grad), norms and sketches": vmapped(model, batch),
        "step with ghost products (GhostSuite)": ghost_products(model, batch, held_out, among=False),
        "step with ghost products (GREATS)": ghost_products(model, batch, held_out, among=True),
    }

    def timed(call: Callable[[], Any]) -> Callable[[], float]:
        def inside() -> float:
            with scorer:  # a pass enters it once, so entering is not timed
                return timing(call)

        return inside

    table = {name: (lambda call=call: timing(call)) for name, call in others.items()}
    memory = {}
    for name, call in ours.items():
        with scorer:
            memory[name] = bytes_kept(model, call) + (0 if "losses" in name else scorer.held)
    return table | {name: timed(call) for name, call in ours.items()}, memory


def loop(model: nn.Module, batch: Batch, *, eta: float | None) -> Callable[[], Any]:
    """One sample at a time; with ``eta`` also the loss reduction by a step on it."""
    names, parameters = zip(*_factors(model).items(), strict=True)
    sketch = Sketch(512, seed=0)

    def run() -> Any:
        found = []
        for i in range(batch.size):
            one = batch.single(i)
            loss = losses(model, one).sum()
            gradients = torch.autograd.grad(loss, parameters)
            norm = torch.stack([g.norm() for g in gradients]).norm()
            found.append([norm, sketch({name: g[None] for name, g in zip(names, gradients, strict=True)})])
            if eta is not None:
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.sub_(eta * gradient)
                    found[-1].append(loss - losses(model, one).sum())
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.add_(eta * gradient)
        return found

    return run


def vmapped(model: nn.Module, batch: Batch) -> Callable[[], Any]:
    """Gradients, norms and sketches by ``vmap(grad)`` over the factors."""
    factors = {name: parameter.detach() for name, parameter in _factors(model).items()}
    sketch = Sketch(512, seed=0)
    length = batch.inputs["input_ids"].shape[1]
    mask = batch.inputs["attention_mask"].bool()[:, None, None, :].expand(-1, 1, length, length)
    inputs = {**batch.inputs, "attention_mask": mask}  # a mask of positions is looked into, which vmap cannot do

    def loss(values: dict[str, Tensor], inputs: dict[str, Tensor], label: Tensor) -> Tensor:
        one = batch.of({name: value[None] for name, value in inputs.items()}, label[None])

        def forward(**_: Any) -> Any:
            return torch.func.functional_call(model, values, (), one.inputs)

        return losses(forward, one).sum()  # type: ignore[arg-type]

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")

    def run() -> Any:
        with torch.no_grad():  # of the parameters that are no factors
            gradients = each(factors, inputs, batch.labels)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
        return norms, sketch(gradients)

    return run


def ghost_products(model: nn.Module, batch: Batch, held_out: Batch, *, among: bool) -> Callable[[], Any]:
    """A training step on ``batch`` in which products with the gradients of ``held_out`` (and ``among`` the batch) fall
    off: (B, V), or (B, B + V)."""
    both = batch.joined(held_out)
    rows, train = both.size, batch.size

    def run() -> Any:
        model.zero_grad()
        products = torch.zeros(train, rows if among else rows - train, device=both.labels.device)
        with _heard(model, rows, partial(_add_products, products, train)):
            losses(model, both).sum().backward()
        return products

    return run


def _add_products(products: Tensor, train: int, delta: Tensor, x: Tensor) -> None:
    """Add one module's; ``delta`` (B + V, T, d_out), ``x`` (B + V, T, d_in)."""
    first = train if products.shape[1] == len(delta) - train else 0
    tokens, d_in, d_out = x.shape[1], x.shape[2], delta.shape[2]
    if tokens * (d_in + d_out) < d_in * d_out:
        a = torch.einsum("itd,jsd->ijts", delta[:train], delta[first:])
        products += a.mul_(torch.einsum("itd,jsd->ijts", x[:train], x[first:])).sum((2, 3))
    else:
        gradients = torch.bmm(delta.transpose(1, 2), x).flatten(1)
        products += gradients[:train] @ gradients[first:].T


@contextmanager
def _heard(model: nn.Module, rows: int, receive: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach().reshape(rows, -1, args[0].shape[-1])
        output.register_hook(lambda delta: receive(delta.reshape(rows, -1, delta.shape[-1]), x))

    handles = [part.register_forward_hook(hook) for part in theta_modules(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def opacus(model: nn.Module, batch: Batch) -> Callable[[], Any] | None:
    """Opacus' per-sample gradients and norms, or None where it is not installed. It changes ``model``."""
    try:
        from opacus import GradSampleModule
    except ImportError:
        return None
    wanted = {id(p) for p in _factors(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    wrapped = GradSampleModule(model).train()  # in evaluation mode it takes no gradients

    def run() -> Any:
        for parameter in wrapped.parameters():
            parameter.grad_sample = None
        losses(wrapped, batch).mean().backward()
        per_sample = [p.grad_sample for p in wrapped.parameters() if p.requires_grad]
        return torch.stack([g.flatten(1).norm(dim=1) for g in per_sample]).norm(dim=0)

    return run


def _factors(model: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.weight": part.weight for name, part in theta_modules(model).items()}


def timing(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(path: str, rank: int, length: int, options: argparse.Namespace, device: str) -> None:
    """Time all rows in turns and print them."""
    dtype = getattr(torch, options.dtype)
    model = build(path, rank, device, dtype)
    batch = Batch(model, options.batch, length, device)
    table, memory = rows(model, batch, Batch(model, max(1, options.batch // 4), length, device))
    if grad_sample := opacus(build(path, rank, device, dtype), batch):
        table["opacus, gradients and norms"] = lambda: timing(grad_sample)
    times: dict[str, list[float]] = {name: [] for name in table}
    for turn in range(options.repeat + 1):
        for name, timed in table.items():
            if name not in times or (name.startswith("loop") and turn > options.loop_repeat):
                continue
            try:
                seconds = timed()
            except Exception as error:  # of a rival that cannot do this model
                print(f"{name}: {' '.join(str(error).split())[:200]}", file=sys.stderr)
                del times[name]
                continue
            if turn:  # the first turn warms up
                times[name].append(seconds)
    base = statistics.median(times["LoRA training step"])
    for name, taken in times.items():
        if taken:
            median = statistics.median(taken)
            label = f"{path.rstrip('/').rsplit('/', 1)[-1]} | {rank} | {length} | {name}"
            kept = f"{memory[name] / options.batch / 2**20:.2f}" if name in memory else ""
            print(f"| {label} | {median * 1e3:.0f} | {median / base:.2f} | {options.batch / median:.0f} | {kept} |")


def main() -> None:
    """Time all rows and print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--length", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, nargs="+", default=[8])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--loop-repeat", type=int, default=2, help="the loops are slow; 0 leaves them out")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        reuse_freed_memory()  # as a scoring pass does; the training step gets it, too
    print(f"{device}, {torch.get_num_threads()} threads, {options.dtype}, batch {options.batch}\n")
    print("| model | rank | length | row | median ms | ratio | samples/s | kept MB a sample |")
    print("|" + "---|" * 8)
    for path in options.model:
        for rank in options.rank:
            for length in options.length:
                measured(path, rank, length, options, device)


if __name__ == "__main__":
    main()
