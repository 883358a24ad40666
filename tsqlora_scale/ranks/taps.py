"""Hear the weight gradients of frozen linear layers during an ordinary backward pass, group by group.

A frozen weight has no ``.grad``. Its gradient is delta^T x, with x the layer's input and delta the gradient of its
output. Both are at hand for a moment in the backward pass, where a :class:`_Tap` on the output picks them up.

Three things make this less simple than it sounds:

* A layer may be called several times in a forward pass (DeBERTa's key projection: once on hidden states, once on
  relative positions). Gradients of all calls are summed before the statistic is taken, because it is not linear.
* Such a call may lack the batch dimension; its gradient arrives summed over the micro-batch and cannot be taken
  apart. Then the whole micro-batch is one group, for all layers, so that they stay comparable.
* Under activation checkpointing the forward pass runs again within the backward pass. Calls are counted outside of
  the backward pass only, and x is kept as a saved tensor of the autograd graph, so that checkpointing may drop and
  recompute it like any other activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tsqlora_scale.engine.sharded import lasting
from tsqlora_scale.ranks.estimators import (
    ghost_is_cheaper,
    ghost_squared_norm,
    gradient_sketch,
    mean_abs_product,
    squared_norm,
    weight_gradient,
)
from tsqlora_scale.tasks.packing import Packing


class _Tap(torch.autograd.Function):
    """Identity on a linear layer's output; in the backward pass, hands (x, delta) over.

    ``anchor`` is an empty tensor that requires grad: the first layers of a frozen model would otherwise see no
    backward pass. It never receives a gradient.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, anchor: Tensor, x: Tensor, receive: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.receive = receive
        return out.view_as(out)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.receive(x, delta.detach())
        return delta, None, None, None


@dataclass
class Site:
    """One linear layer that is listened to, and what it has said in the current micro-batch."""

    layer: str
    linear: nn.Module
    #: The weight, (d_out, d_in); only callable in the layer's own backward pass.
    weight: Callable[[], Tensor]
    #: Omega, (k, d_out), where a sketch of the gradient is wanted.
    projection: Tensor | None = None
    #: Whether its inputs never have the batch first, whatever their sizes say.
    without_batch: bool = False
    #: Omega G summed since :meth:`Listener.start`, (k, d_in) float32 on the layer's device.
    sketch: Tensor | None = None
    calls: int = 0
    arrived: int = 0
    #: (groups, d_out, d_in), float32; only while a layer with several calls waits for the rest of them.
    gradients: Tensor | None = None
    #: Its weight meanwhile: a sharded one is not at hand any more when a call turns out to bring no gradient.
    held_weight: Tensor | None = None
    #: Sum over the groups since :meth:`Listener.start`, a float64 scalar on the layer's device.
    total: Tensor | None = None
    #: Gradients heard since :meth:`Listener.start`.
    heard: int = 0


class Listener:
    """Forward hooks on linear layers, and the statistic of each group of samples.

    The statistic of a group of n samples is weighted by n; ``scale`` turns a gradient of the group's share of the
    loss into that of a mean over the group when divided by n (see :class:`~.sensitivity.SensitivityTracker`).

    Of the ``batch_size`` samples of a global batch at most ``max_samples`` take part, but one group at least: every
    k-th group, with others in the next step. A group's number in the global batch and the step decide, so the choice
    does not depend on who trains on it.
    """

    def __init__(
        self,
        *,
        group_size: int,
        batch_size: int,
        max_samples: int | None,
        squared: bool,
        on_shared_call: Callable[[str], None],
    ) -> None:
        self.group_size = group_size
        self.batch_size = batch_size
        self.max_samples = max_samples or batch_size
        self.squared = squared
        self.whole_micro_batch = False
        self._on_shared_call = on_shared_call
        self._sites: list[Site] = []
        self._handles: list[Any] = []
        self._listening = False
        self._scale, self._turn = 1.0, 0
        self._micro_batch = 0
        self._position = 0
        self._packing: Packing | None = None
        #: Samples of the groups that took part since :meth:`start`.
        self.samples = 0

    def attach(self, sites: list[Site]) -> None:
        """Hook ``sites`` and forget the former ones.

        The hooks come first in line: an engine that gathers sharded weights in hooks of its own, registered later,
        wraps the output after the tap does, and so has the weight whole when the tap's gradient arrives.
        """
        self.detach()
        self._sites = sites
        self._handles = [
            site.linear.register_forward_hook(partial(self._on_forward, site), prepend=True) for site in sites
        ]

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._sites, self._listening = [], [], False

    def start(self, scale: float, turn: int) -> None:
        """Listen to the micro-batches that follow.

        Args:
            turn: which of every k groups take part, modulo k: one more in every listened step.
        """
        self._scale, self._turn, self._listening = scale, turn, True
        self._micro_batch = self._position = self.samples = 0
        for site in self._sites:
            site.calls = site.arrived = site.heard = 0
            site.gradients = site.held_weight = site.total = site.sketch = None

    def start_micro_batch(self, size: int, position: int, packing: Packing | None = None) -> None:
        """The next forward and backward pass is over ``size`` samples, of the global batch from ``position`` on; with
        ``packing`` they stand end to end in it."""
        self._finish_micro_batch()
        self._micro_batch, self._position, self._packing = size, position, packing

    def stop(self) -> list[Site]:
        """Stop listening; the sites with their totals."""
        self._finish_micro_batch()
        self._listening = False
        return self._sites

    def _finish_micro_batch(self) -> None:
        """Count its samples. Calls whose output never reached the loss bring no gradient: what has arrived is all."""
        self.samples += sum(group.stop - group.start for group in self._groups())
        for site in self._sites:
            if site.gradients is not None:
                self._finish(site)
            site.calls = site.arrived = 0

    def _on_forward(self, site: Site, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        if not self._listening:
            return None
        x: Tensor = args[0]
        assert self._micro_batch > 0, "start_micro_batch() comes before the forward pass of a listened step"
        recomputed = torch._C._current_graph_task_id() != -1  # activation checkpointing, inside a backward pass
        if not recomputed:
            site.calls += 1
            if (site.without_batch or not self._by_sample(x)) and not self.whole_micro_batch:
                self.whole_micro_batch = True  # before any gradient of this micro-batch has arrived
                if self.group_size < self._micro_batch:
                    self._on_shared_call(site.layer)
        if not torch.is_grad_enabled():
            return None
        anchor = out.new_empty(0, requires_grad=True)
        tapped: Tensor = _Tap.apply(out, anchor, x.detach(), partial(self._on_gradient, site))  # type: ignore[no-untyped-call]
        return tapped

    def _by_sample(self, x: Tensor) -> bool:
        return x.shape[0] == self._micro_batch if self._packing is None else self._packing.holds(x)

    def _parts(self, group: slice, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        if self._packing is None:
            return x[group], delta[group]
        return self._packing.tokens_of(x, group), self._packing.tokens_of(delta, group)

    def _groups(self) -> list[slice]:
        """The groups of the current micro-batch that take part."""
        if self._micro_batch == 0:
            return []
        size = self._micro_batch if self.whole_micro_batch else self.group_size
        step = -(-self.batch_size // max(self.max_samples // size * size, size))
        starts = range(0, self._micro_batch, size)
        # in turn: a batch is in order of length, and those of one place are long ones, or short ones, in every step
        chosen = [i for i in starts if (self._position + i) // size % step == self._turn % step]
        return [slice(i, min(i + size, self._micro_batch)) for i in chosen]

    @torch.no_grad()
    def _on_gradient(self, site: Site, x: Tensor, delta: Tensor) -> None:
        site.arrived += 1
        site.heard += 1
        if site.projection is not None:  # linear in the gradient: calls and groups need not be told apart
            site.projection = site.projection.to(delta.device)
            sketch = gradient_sketch(x, delta, site.projection)
            site.sketch = sketch if site.sketch is None else site.sketch + sketch
        groups = self._groups()
        if not groups:
            return
        # samples that need not be told apart may come in any leading shape
        whole = groups[0] == slice(0, self._micro_batch)
        pairs = [(x, delta)] if whole else [self._parts(group, x, delta) for group in groups]
        if site.calls == 1:
            weight = None if self.squared else site.weight()
            for group, pair in zip(groups, pairs, strict=True):
                self._add(site, group, self._of_pair(*pair, weight))
            return
        if site.gradients is None:
            shape = (len(groups), delta.shape[-1], x.shape[-1])
            site.gradients = torch.zeros(shape, dtype=torch.float32, device=x.device)
            site.held_weight = None if self.squared else lasting(site.weight(), site.linear)
        for total, pair in zip(site.gradients, pairs, strict=True):
            total += weight_gradient(*pair)
        if site.arrived == site.calls:
            self._finish(site)

    def _of_pair(self, x: Tensor, delta: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            return mean_abs_product(weight_gradient(x, delta), weight)
        if ghost_is_cheaper(x, delta):
            return ghost_squared_norm(x, delta)
        return squared_norm(weight_gradient(x, delta))

    @torch.no_grad()
    def _finish(self, site: Site) -> None:
        assert site.gradients is not None
        weight = site.held_weight
        for group, gradient in zip(self._groups(), site.gradients, strict=True):
            self._add(site, group, squared_norm(gradient) if weight is None else mean_abs_product(gradient, weight))
        site.gradients = site.held_weight = None

    def _add(self, site: Site, group: slice, value: Tensor) -> None:
        """With n samples in the group: n |scale / n * value|, or n (scale / n)^2 * value for a squared statistic."""
        factor = self._scale**2 / (group.stop - group.start) if self.squared else self._scale
        site.total = factor * value if site.total is None else site.total + factor * value
