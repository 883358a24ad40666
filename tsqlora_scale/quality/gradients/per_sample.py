"""Exact per-sample gradients of the LoRA factors, a batch at a time.

For a linear module the gradient of sample ``i`` is ``sum_t delta_it x_it^T``, with ``x`` the module's input and
``delta`` the gradient of its output. Both are seen by hooks on the adapter's own small modules; no weight is ever
read, so weights may be sharded (ZeRO-3: shape (0,)) or packed to 4 bits.

Where only norms and sketches are wanted (:meth:`PerSampleGradients.folded`), no gradient is kept: both add up over the
factors, so a factor's gradients are folded into them as soon as they are heard.

Under activation checkpointing the forward pass of a layer runs again within the backward pass. The inputs are saved
tensors of the autograd graph, so they are dropped and recomputed like any other activation, and every call is heard
once: the graph that the repetition builds is never gone through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tsqlora_scale.engine.arithmetic import unit_roundoff
from tsqlora_scale.quality.gradients.batch_memory import LiveBytes
from tsqlora_scale.quality.gradients.batchless import NoSecondBatch, give_batch, same_mark
from tsqlora_scale.quality.gradients.evaluation_mode import evaluation_mode
from tsqlora_scale.quality.gradients.folds import Folds, Update
from tsqlora_scale.quality.gradients.sketch import Sketch
from tsqlora_scale.quality.pool import BatchT, LossFn
from tsqlora_scale.tasks.packing import Packing

#: half-precision gradients underflow below 6e-8; a power of two costs no digits
FP16_LOSS_SCALE = 2.0**10


def _loss_scale(losses: Tensor) -> float:
    """What losses (B,) are multiplied by in half precision: a power of two that keeps a squared error's gradient, twice
    the root of the loss, far below 65504. That of a cross-entropy is below 1 whatever the loss."""
    finite = losses[losses.isfinite()]
    largest = math.sqrt(max(float(finite.max()), 1.0)) if len(finite) else 1.0
    return min(FP16_LOSS_SCALE, 2.0 ** math.floor(math.log2(2.0**13 / largest)))


class _Heard(torch.autograd.Function):
    """Identity on a module's output; in the backward pass, hands the module's input and the output's gradient over.

    ``anchor`` is an empty tensor that requires grad: nothing before the first layers does, nor before DeBERTa's
    positions. It never receives a gradient.
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


class PerSampleGradients:
    """Per-sample gradients of theta; a context manager around any number of batches.

    Inside it ``module`` is in evaluation mode (and goes on checkpointing activations, :mod:`.evaluation_mode`) and no
    parameter requires grad, so backward computes input gradients alone and the reduction hooks of DDP and ZeRO stay
    silent. On leaving, also by an exception, training modes and ``requires_grad`` are as they were; ``.grad`` is never
    touched.

    ``module`` must be the unwrapped model: a forward through a DeepSpeed engine changes the engine's next step.

    Memory: ``batch * |theta|`` float32 numbers for :meth:`per_sample`; ``batch`` times the largest factor, whatever
    theta's size, for :meth:`folded` (and the factors of modules that are called more than once).

    Args:
        module: the model.
        theta: its linear modules whose parameters make theta, by name, sorted.

    Attributes:
        batchless: name of the first module that was called with an input without the batch's dimension and could
            not be given it (see :mod:`.batchless`); None while there was none. Its output gradient arrives summed
            over the batch, so :meth:`per_sample` is then wrong for this model, but for batches of one.
        recomputed: set to a number to have it raised to the bytes that the repetition of a checkpointed layer takes.
        held: the most bytes of gradients that the last batch had at once.
        positions: what theta's modules have seen of each sample of the last batch, in positions of all calls.
    """

    def __init__(self, module: nn.Module, theta: Mapping[str, nn.Linear]) -> None:
        engine = isinstance(module, nn.parallel.DistributedDataParallel) or type(module).__name__ == "DeepSpeedEngine"
        assert not engine, "scoring goes through the unwrapped model, never through the engine"
        self.module = module
        self.batchless: str | None = None
        self._early: bool | None = None  # whether the model has batchless calls; not known before the first batch
        self._theta = theta
        self._mode: Literal["idle", "collect", "fold", "shift"] = "idle"
        self._size = 0
        self._packing: Packing | None = None  # in which the samples of the present batch stand end to end
        self._gradients: dict[str, Tensor] = {}
        self._folds: Folds | None = None
        self.held = 0
        self.positions = 0
        self.recomputed: int | None = None
        self._eta = 0.0
        self._half = any(parameter.dtype == torch.float16 for parameter in module.parameters())
        self._scale = 1.0
        self._types = {parameter.dtype for parameter in module.parameters()}
        self._types |= {getattr(part, "compute_dtype", None) or torch.float32 for part in module.modules()}
        self._undo: list[Callable[[], Any]] = []

    @property
    def rounding(self) -> float:
        """Machine epsilon of the coarsest type computed in: weights, 4-bit layers' compute type, autocast's outputs."""
        return max(unit_roundoff(kind) for kind in self._types if kind.is_floating_point)

    def __enter__(self) -> PerSampleGradients:
        evaluating = ExitStack()
        evaluating.enter_context(evaluation_mode(self.module, self._recomputing))
        self._undo.append(evaluating.close)
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
            self._undo.append(partial(parameter.requires_grad_, True))
        for name, part in self._theta.items():
            handle = part.register_forward_hook(self._hook(name, has_bias=part.bias is not None))
            self._undo.append(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()
        self._gradients = {}

    def per_sample(self, losses: LossFn[BatchT], batch: BatchT) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (B,) and every sample's own gradient, by parameter name in sorted order, float32.

        Weights have shape (B, d_out, d_in), which is (B, r, d_in) for ``lora_A`` and (B, d_out, r) for ``lora_B``;
        biases (B, d_out). A parameter that the loss does not depend on is left out.
        Wrong, with :attr:`batchless` set, where a module was called without the batch's dimension.
        """
        values, collected = self._backward("collect", losses, batch)
        gradients = dict(sorted(collected.items()))
        self.held = sum(gradient.nbytes for gradient in gradients.values())
        if self._scale != 1:
            gradients = {name: gradient / self._scale for name, gradient in gradients.items()}
        return values, gradients

    def folded(
        self, losses: LossFn[BatchT], batch: BatchT, *, sketch: Sketch | None, update: Update | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (B,), norms (B,) and sketches (B, dim; 0 wide without ``sketch``) of the samples' gradients, float32;
        with ``update`` sketches of what it makes of them.

        What :meth:`per_sample` says of batches without their dimension holds here, too.
        """
        self._folds = folds = Folds(batch.size, sketch, update)
        try:
            values, left = self._backward("fold", losses, batch)
            for name in sorted(left):  # of modules some calls of which the loss does not depend on
                folds.add(name, left[name])
        finally:
            self._folds = None
        self.held = folds.held
        return values, *folds.result()

    def losses_alone(self, losses: LossFn[BatchT], batch: BatchT) -> Tensor:
        """Losses (B,) float32, by a forward pass without a graph."""
        assert self._undo, "use inside 'with'"
        self.positions = 0
        with torch.no_grad():
            values = losses(self.module, batch)
        assert values.shape == (batch.size,), f"losses of shape {tuple(values.shape)} for {batch.size} samples"
        return values.float()

    def _backward(
        self, mode: Literal["collect", "fold"], losses: LossFn[BatchT], batch: BatchT
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (B,) float32, and the gradients that are left, unsorted and scaled."""
        assert self._undo, "use inside 'with'"
        self._mode, self._size, self._gradients, self.positions = mode, batch.size, {}, 0
        self._packing = getattr(batch, "packing", None)
        try:
            with torch.enable_grad():
                with self._batching():
                    values = losses(self.module, batch)
                assert values.shape == (batch.size,), f"losses of shape {tuple(values.shape)} for {batch.size} samples"
                self._scale = _loss_scale(values.detach().float()) if self._half else 1.0
                if self._folds is not None:
                    self._folds.scale = self._scale
                torch.autograd.backward(values.float().sum() * self._scale)
        finally:
            self._mode = "idle"
            collected, self._gradients = self._gradients, {}
        return values.detach().float(), collected

    @contextmanager
    def stepped(self, gradients: Mapping[str, Tensor], eta: float) -> Iterator[None]:
        """Inside, every sample of the last batch sees its own factors ``theta - eta * gradient_i``; forwards of that
        batch only, without a graph.

        The factors do not change: each module's output is shifted by ``-eta * G_i x_i``.
        """
        self._gradients, self._eta, self._mode = dict(gradients), eta, "shift"
        self._size = len(next(iter(gradients.values())))
        try:
            with torch.no_grad(), self._batching():
                yield
        finally:
            self._mode, self._gradients = "idle", {}

    @contextmanager
    def _batching(self) -> Iterator[None]:
        """Around a forward over several samples. Every function of torch is watched, so only where there is need."""
        if self._size == 1 or self._early is False or self._packing is not None:
            yield
            return
        with NoSecondBatch(self._size):
            yield
        self._early = bool(self._early)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Around the repetition of a checkpointed layer's forward pass, on whatever thread."""
        with ExitStack() as stack:
            if self._size > 1 and self._early and self._packing is None:
                stack.enter_context(NoSecondBatch(self._size))
            live = None
            if self.recomputed is not None:
                live = stack.enter_context(LiveBytes(self.module.parameters()))
            try:
                yield
            finally:  # a repetition is broken off as soon as it has given what is wanted
                if live is not None:
                    self.recomputed = max(self.recomputed or 0, live.peak)

    def _hook(self, name: str, *, has_bias: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            self._types.add(output.dtype)
            x = args[0]
            forward = torch._C._current_graph_task_id() == -1  # else the repetition of a checkpointed layer
            if forward:
                self.positions += x.numel() // (x.shape[0] * x.shape[-1])
            if self._mode == "idle":
                return None
            alike = self._packing is None and self._size > 1 and self._early is not False
            if alike and x.dim() > 2 and x.shape[0] == 1:
                self._early = True
                output = give_batch(output, self._size)
            if self._mode == "shift":
                return self._shift(name, x, output)
            if self._folds is not None and forward:
                self._folds.expect(name)
            return self._listen(name, x.detach(), output, has_bias)

        return hook

    def _listen(self, name: str, x: Tensor, output: Tensor, has_bias: bool) -> Tensor:
        rows, gradients, folds = self._size, self._gradients, self._folds
        packing, lacks_batch = self._packing, self._lacks_batch(output)
        if lacks_batch:
            self.batchless = self.batchless or name

        # input and gradient come together, call by call: a module may be called several times, in any backward order
        def add(x: Tensor, delta: Tensor) -> None:
            if lacks_batch:
                return
            wide = torch.promote_types(torch.promote_types(delta.dtype, x.dtype), torch.float32)  # here, not kept
            d, x = _rows(delta.to(wide), rows, packing), _rows(x.to(wide), rows, packing)
            if folds is not None and folds.takes_rows(name, d, x):
                folds.add_rows(f"{name}.weight", d, x)
            else:
                _accumulate(gradients, f"{name}.weight", _outer(d, x))
            if has_bias:
                _accumulate(gradients, f"{name}.bias", d.float().sum(1))
            if folds is not None:
                folds.heard(name, gradients)

        anchor = output.new_empty(0, requires_grad=True)
        heard: Tensor = _Heard.apply(output, anchor, x, add)  # type: ignore[no-untyped-call]
        return same_mark(heard, output)

    def _lacks_batch(self, output: Tensor) -> bool:
        if self._packing is not None:
            return not self._packing.holds(output)
        return self._size > 1 and (output.dim() < 2 or output.shape[0] != self._size)

    def _shift(self, name: str, x: Tensor, output: Tensor) -> Tensor:
        weight, bias = (self._gradients.get(f"{name}.{kind}") for kind in ("weight", "bias"))
        rows, packing = self._size, self._packing
        if weight is None or self._lacks_batch(output):
            return output
        change = torch.bmm(_rows(x.to(weight.dtype), rows, packing), weight.transpose(1, 2))
        if bias is not None:
            change = change + bias.unsqueeze(1)
        if packing is not None:
            change = packing.laid(change)
        return same_mark((output - self._eta * change.reshape(output.shape)).to(output.dtype), output)


def _rows(x: Tensor, rows: int, packing: Packing | None) -> Tensor:
    """(rows, ..., width), (1, ..., width) for all rows, or samples end to end, to (rows, tokens, width)."""
    if packing is not None:
        return packing.rows(x)
    flat = x.reshape(x.shape[0] if rows > 1 else 1, -1, x.shape[-1])
    return flat.expand(rows, -1, -1)


def _accumulate(gradients: dict[str, Tensor], name: str, value: Tensor) -> None:
    gradients[name] = gradients[name] + value if name in gradients else value


def _outer(delta: Tensor, x: Tensor) -> Tensor:
    """(B, T, d_out), (B, T, d_in) -> (B, d_out, d_in) float32, stored with the longer side last in memory."""
    if x.shape[-1] >= delta.shape[-1]:
        return torch.bmm(delta.transpose(1, 2), x).float()
    return torch.bmm(x.transpose(1, 2), delta).float().transpose(1, 2)
