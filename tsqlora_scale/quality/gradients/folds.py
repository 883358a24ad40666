"""Norms and sketches of per-sample gradients that come one factor at a time and are not kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from tsqlora_scale.quality.gradients.sketch import Sketch

#: From a parameter's name and its gradients of the samples, (B, ...), to what is sketched of them, of that shape.
Update = Callable[[str, Tensor], Tensor]


class Folds:
    """Squared norms and sketches of one batch; both are sums over the factors of theta.

    The norm of a sum of calls is no sum of norms, so the gradient of a module that is called several times is kept
    until its last call is heard. The calls are counted in the forward pass, all of which comes before any of the
    backward pass. In whatever order an engine's backward pass comes by the factors, the sums are the same: squares are
    added in the order of names, sketches in float64.

    Args:
        size: samples in the batch.
        sketch: None where no sketches are wanted.
        update: what the sketches are of, by a parameter's name and gradients (B, ...); None: the gradients.

    Attributes:
        scale: how many times what they should be the gradients are; known before the backward pass.
        held: the most bytes of gradients that were there at once; a factor's own twice, the second time on its way
            into the sketch, and once more where its update is.
    """

    def __init__(self, size: int, sketch: Sketch | None, update: Update | None = None) -> None:
        self.held = 0
        self.scale = 1.0
        self._size = size
        self._sketch = sketch
        self._update = update
        self._calls: Counter[str] = Counter()
        self._heard: Counter[str] = Counter()
        self._squares: dict[str, Tensor] = {}
        self._sketches: Tensor | None = None

    def expect(self, module: str) -> None:
        """The forward pass calls ``module``."""
        self._calls[module] += 1

    def heard(self, module: str, gradients: dict[str, Tensor]) -> None:
        """The backward pass has added a call of ``module`` to ``gradients``, from which its own go after its last."""
        self._heard[module] += 1
        present = sum(gradient.nbytes for gradient in gradients.values())
        largest = max((gradient.nbytes for gradient in gradients.values()), default=0)
        self.held = max(self.held, present + largest * self._copies)
        if self._heard[module] >= self._calls[module]:
            for kind in ("weight", "bias"):
                gradient = gradients.pop(f"{module}.{kind}", None)
                if gradient is not None:
                    self.add(f"{module}.{kind}", gradient)

    def add(self, name: str, gradient: Tensor) -> None:
        """A parameter's whole gradient, (B, ...) float32."""
        norm = torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.dim())))
        self._squares[name] = norm.double().square()
        if self._sketch is not None:
            if self._sketches is None:
                self._sketches = torch.zeros(self._size, self._sketch.dim, dtype=torch.float64, device=gradient.device)
            self._sketch.add(self._sketches, name, self._sketched(name, gradient))

    def _sketched(self, name: str, gradient: Tensor) -> Tensor:
        if self._update is None:
            return gradient
        return self._update(name, gradient if self.scale == 1 else gradient / self.scale)

    @property
    def _copies(self) -> int:
        """How many of a factor's gradients there are beside itself at once."""
        return 1 if self._update is None else 2 if self.scale == 1 else 3

    def takes_rows(self, module: str, delta: Tensor, x: Tensor) -> bool:
        """Whether :meth:`add_rows` is right, and cheaper than the gradient: T^2 (d_in + d_out) multiplications in
        float64 against T d_in d_out. A sketch needs the gradient anyway."""
        tokens, d_in, d_out = x.shape[1], x.shape[-1], delta.shape[-1]
        return self._sketch is None and self._calls[module] == 1 and 2 * tokens * (d_in + d_out) < d_in * d_out

    def add_rows(self, name: str, delta: Tensor, x: Tensor) -> None:
        """A weight's gradient by its outer factors (B, T, d_out) and (B, T, d_in): its squared norm is the sum over
        t, t' of (delta_t . delta_t') (x_t . x_t'), in which terms of either sign cancel, hence in float64."""
        delta, x = delta.double(), x.double()
        products = torch.bmm(delta, delta.transpose(1, 2)).mul_(torch.bmm(x, x.transpose(1, 2)))
        self._squares[name] = products.sum((1, 2)).clamp_(min=0)

    def result(self) -> tuple[Tensor, Tensor]:
        """Norms (B,) of the gradients and sketches (B, dim), float32."""
        assert self._squares, "the loss does not depend on any adapter"
        squares = torch.stack([self._squares[name] for name in sorted(self._squares)]).sum(0)
        sketches = squares.new_zeros(self._size, 0) if self._sketches is None else self._sketches
        if self._update is None:
            sketches = sketches / self.scale
        return (squares.sqrt() / self.scale).float(), sketches.float()
