"""EVA (2410.07170): A starts as the leading principal components of what a layer is given, B as zero.

As in its authors' code and PEFT's the inputs' mean is taken out, which would else be the first component. They are
found by subspace iteration: a pass over the samples multiplies the scatter matrix of a layer's inputs by some more
vectors than are wanted, and the matrix itself, d_in x d_in for every layer, is never there. Ranks stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

#: Passes over the samples, of which a test asks 99.9 % of what the best subspace keeps.
PASSES = 4
#: Vectors beside those that are wanted.
MORE = 8


class LeadingInputs:
    """Leading principal components of the inputs of some layers, over any number of forward passes.

    Args:
        layers: by name, in the order in which ``generator`` is drawn from; each with ``in_features``.
        rank: vectors of each, or its width where that is less.
    """

    def __init__(self, layers: Mapping[str, LoraLayer], rank: int, generator: torch.Generator) -> None:
        self._layers: dict[str, Any] = dict(layers)
        self._rank = rank
        self._basis: dict[str, Tensor] = {}
        self._product: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}
        self._mean: dict[str, Tensor] = {}
        self._count = dict.fromkeys(self._layers, 0)
        for name, layer in self._layers.items():
            width = int(layer.in_features)
            drawn = torch.empty(width, min(rank + MORE, width)).normal_(generator=generator)
            self._basis[name] = torch.linalg.qr(drawn)[0]

    def find(self, one_pass: Callable[[], None]) -> dict[str, Tensor]:
        """The vectors, (rank, d_in) float32 on the CPU, orthonormal rows, the leading one first.

        Args:
            one_pass: takes all samples through the model, without padding, and always the same.
        """
        for number in range(PASSES):
            self._product = {name: torch.zeros_like(basis) for name, basis in self._basis.items()}
            handles = [
                layer.register_forward_pre_hook(partial(self._hear, name)) for name, layer in self._layers.items()
            ]
            try:
                one_pass()
            finally:
                for handle in handles:
                    handle.remove()
            if number == 0:
                self._take_means_out()
            if number < PASSES - 1:
                self._basis = {name: torch.linalg.qr(product)[0] for name, product in self._product.items()}
        return {name: self._leading(name) for name in self._layers}

    def _hear(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        if name in self._mean:
            x = x - self._mean[name]
        else:
            self._sum[name] = self._sum.get(name, 0) + x.sum(0)
            self._count[name] += len(x)
        basis = self._basis[name].to(x.device)
        self._basis[name] = basis
        self._product[name] = self._product[name].to(x.device) + x.T @ (x @ basis)

    def _take_means_out(self) -> None:
        """Of the first pass, which did not know them: sum x (x.T b) less n m (m.T b)."""
        for name, total in self._sum.items():
            self._mean[name] = total / max(self._count[name], 1)
            self._product[name] -= torch.outer(total, self._mean[name] @ self._basis[name])

    def _leading(self, name: str) -> Tensor:
        """Within the subspace, by the scatter matrix's part in it."""
        basis = self._basis[name].double().cpu()
        inner = basis.T @ self._product[name].double().cpu()
        _, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        leading: Tensor = basis @ vectors.flip(1)[:, : self._rank]
        return leading.T.float().contiguous()


def start_in_inputs(layers: Mapping[str, LoraLayer], adapter: str, vectors: Mapping[str, Tensor]) -> None:
    """Let A of every layer start as its vectors; rows beyond a layer's width stay as they were drawn."""
    layer: Any
    for name, layer in layers.items():
        weight = layer.lora_A[adapter].weight
        weight.data[: len(vectors[name])].copy_(vectors[name])
