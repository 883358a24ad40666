"""Norms and sketches of the samples' own gradients, taken of the products that a training step makes anyway.

The gradient of a linear module's weight is the sum over samples of ``G_i = sum_t delta_it x_it^T``. Autograd makes it
in one product over samples and positions. Here the module's own backward makes the ``G_i`` first, at as many
operations, takes norm and sketch of each, and gives their sum to autograd: what it costs beyond an ordinary step is
reading and writing ``batch * |theta|`` numbers a few times, a module's at a time (benchmarks/online.py).

Nothing else of the step changes: masks of dropout, hooks of the engine and of the rank half, checkpointed activations,
accumulation. Weights may be sharded (ZeRO-3), as they are gathered for the module's forward and backward, and the base
may be packed to 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tsqlora_scale.model.adapters.lora import short_name
from tsqlora_scale.quality.gradients.sketch import Sketch
from tsqlora_scale.tasks.packing import Packing


class _PerSampleLinear(torch.autograd.Function):
    """``F.linear`` whose backward hands every sample's own gradient over before it gives the sum of them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        receive: Callable[[Tensor, Tensor | None], None],
        packing: Packing | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)  # the parameter itself: under ZeRO-3 its values are there in the backward pass
        ctx.receive, ctx.has_bias, ctx.packing = receive, bias is not None, packing
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        if ctx.packing is not None:
            d, of_samples = ctx.packing.rows(delta), ctx.packing.rows(x)
        else:
            d, of_samples = (part.reshape(part.shape[0], -1, part.shape[-1]) for part in (delta, x))
        gradients = _outer(d, of_samples)
        of_bias = d.float().sum(1) if ctx.has_bias else None
        ctx.receive(gradients, of_bias)
        return (
            delta @ weight if ctx.needs_input_grad[0] else None,
            gradients.sum(0).to(weight.dtype),
            None if of_bias is None else of_bias.sum(0).to(weight.dtype),
            None,
            None,
        )


class FactorGradients:
    """Replaces the forward of theta's linear modules while it listens, and adds up what the samples' gradients are.

    A call without the batch's dimension (DeBERTa's projections of relative positions) has one gradient for all
    samples: it is left out of every sample's, and goes into the step's gradient as ever. A module that is called
    several times has its gradients added up before the norm is taken.

    Args:
        theta: the linear modules of a model whose parameters make theta, by name.
        sketch_dim, seed: of the sketches, which are those of a scoring pass with the same.
        without_batch: layers of the base that never get the batch as their first dimension, whatever the sizes say.

    Attributes:
        shared: name of the first module that was called without the batch's dimension; None while there was none.
    """

    def __init__(
        self,
        theta: Callable[[nn.Module], dict[str, nn.Linear]],
        *,
        sketch_dim: int,
        seed: int,
        without_batch: Collection[str] = frozenset(),
    ) -> None:
        self._theta = theta
        self._dim, self._seed = sketch_dim, seed
        self._without_batch = frozenset(without_batch)
        self._parts: dict[str, nn.Linear] = {}
        self.shared: str | None = None
        self._size = 0
        self._packing: Packing | None = None
        self._calls: dict[str, int] = {}
        self._waiting: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
        self._norms: list[Tensor] = []
        self._sketches: Tensor | None = None

    def attach(self, module: nn.Module) -> None:
        """Take ``module``'s theta in the place of any former one; needed anew whenever modules are replaced."""
        self.detach()
        self._parts = self._theta(module)
        # a new one: the former shapes' signs would stay in memory. It is a function of seed and names
        self._sketch = Sketch(self._dim, seed=self._seed)
        for name, part in self._parts.items():
            part.__dict__["forward"] = partial(self._forward, name, part)

    def detach(self) -> None:
        """Give the modules their own forward back."""
        for part in self._parts.values():
            part.__dict__.pop("forward", None)
        self._parts = {}

    def start(self, size: int, packing: Packing | None = None) -> None:
        """A forward and a backward pass over ``size`` samples follow; with ``packing`` they stand end to end in it."""
        self._size, self._packing = size, packing
        self._calls, self._waiting, self._norms, self._sketches = {}, {}, [], None

    def stop(self) -> tuple[Tensor, Tensor] | None:
        """Norms (B,) and sketches (B, sketch_dim) of the parts that the samples have in the pass's gradient, float32.

        None if no module has said anything of single samples.
        """
        for name in sorted(self._waiting):  # a call whose output has not reached the loss brings no gradient
            self._finish(name)
        self._size = 0
        norms, sketches = self._norms, self._sketches
        self._norms, self._sketches = [], None
        return (torch.linalg.vector_norm(torch.stack(norms), dim=0), sketches) if sketches is not None else None

    def _forward(self, name: str, part: nn.Linear, x: Tensor) -> Tensor:
        if not self._size:
            return nn.Linear.forward(part, x)
        packing = self._packing
        if self._size == 1 and packing is None and x.dim() > 0 and (x.dim() < 3 or x.shape[0] != 1):
            width = x.shape[-1]  # whatever the shape, all of it is the one sample's
            found = self._forward(name, part, x.reshape(1, x.numel() // width, width))
            return found.view(*x.shape[:-1], found.shape[-1])
        by_sample = packing.holds(x) if packing is not None else x.dim() > 1 and x.shape[0] == self._size
        if not by_sample or (self._size > 1 and _layer_of(name) in self._without_batch):
            self.shared = self.shared or name
            return nn.Linear.forward(part, x)
        if torch._C._current_graph_task_id() == -1:  # else a checkpointed layer's repetition, in the backward pass
            self._calls[name] = self._calls.get(name, 0) + 1
        weight: Tensor = part.weight
        bias: Tensor | None = part.bias
        if torch.is_autocast_enabled(x.device.type):  # F.linear would do the same, out of autograd's sight here
            kind = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
        out: Tensor = _PerSampleLinear.apply(x, weight, bias, partial(self._receive, name), packing)  # type: ignore[no-untyped-call]
        return out

    def _receive(self, name: str, gradients: Tensor, of_bias: Tensor | None) -> None:
        self._waiting.setdefault(name, []).append((gradients, of_bias))
        if len(self._waiting[name]) == self._calls.get(name, 1):
            self._finish(name)

    def _finish(self, name: str) -> None:
        weights, biases = zip(*self._waiting.pop(name), strict=True)
        self._add(f"{name}.weight", weights)
        if biases[0] is not None:
            self._add(f"{name}.bias", biases)

    def _add(self, name: str, gradients: tuple[Tensor, ...]) -> None:
        total = gradients[0].float()
        for more in gradients[1:]:
            total = total + more.float()
        self._norms.append(torch.linalg.vector_norm(total, dim=tuple(range(1, total.dim()))))
        if self._sketches is None:
            self._sketches = torch.zeros(self._size, self._sketch.dim, device=total.device)
        self._sketch.add(self._sketches, name, total)


def _outer(delta: Tensor, x: Tensor) -> Tensor:
    """(B, T, d_out), (B, T, d_in) -> (B, d_out, d_in), stored with the longer side last in memory."""
    if x.shape[-1] >= delta.shape[-1]:
        return torch.bmm(delta.transpose(1, 2), x)
    return torch.bmm(x.transpose(1, 2), delta).transpose(1, 2)


def _layer_of(name: str) -> str:
    """The base's layer that a linear module of theta is a factor of."""
    return short_name(name.rpartition(".lora_")[0])
