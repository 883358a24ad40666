"""Where a layer asks for capacity: a small random sketch of its weight gradient (``resize.grow_init: gradient``).

With G (d_out, d_in) the gradient of an optimizer step's loss and Omega (k, d_out) a fixed random matrix, Omega G
(k, d_in) is linear in G: over tokens, micro-batches, processes and steps it adds up without G ever being formed, and
its leading right-singular vectors are near those of G (the range finder of Halko, Martinsson and Tropp, 2011).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tsqlora_scale.common.random_streams import generator_for
from tsqlora_scale.engine.collectives import World

#: Rows k of a sketch: the most directions that an event can take from it, less some for accuracy.
SKETCH_ROWS = 16


class GradientSketches:
    """Omega G of every layer, as a moving average over the listened steps.

    The same average as that of S, so that the directions come from the steps that the rank was given for. It is not
    emptied at an event: what has been learnt since fades, and an event soon after another still has a direction.
    """

    def __init__(self, seed: int, beta: float, *, rows: int = SKETCH_ROWS) -> None:
        """Of a run of this seed; ``beta`` as for S, ``rows`` the number k."""
        self._seed = seed
        self._beta = beta
        self.rows = rows
        #: (k, d_in) float32 by layer, where the layer is; zeros, on the CPU, as long as nothing was heard.
        self._values: dict[str, Tensor] = {}
        #: Of the steps in the average, below 1 where these are few.
        self.weight = 0.0

    def projection(self, layer: str, d_out: int) -> Tensor:
        """Omega, (k, d_out), on the CPU: the same on every process, at every time."""
        return torch.randn(self.rows, d_out, generator=generator_for(self._seed, "gradient sketch", layer))

    def add_layer(self, layer: str, d_in: int) -> None:
        """Start with a sketch of zeros, unless there is one."""
        self._values.setdefault(layer, torch.zeros(self.rows, d_in))

    def count(self) -> None:
        """A step is taken in, of all layers."""
        self.weight = self._beta * self.weight + (1 - self._beta)

    def update(self, layer: str, step: Tensor) -> None:
        """Take in the sketch of a step's gradient, without bias correction. The host waits for nothing."""
        self._values[layer] = self._beta * self._values[layer].to(step.device) + (1 - self._beta) * step

    def average(self, world: World) -> None:
        """Take the mean over processes, layer by layer, in float64: all layers at once would be a second model. A
        collective."""
        if world.size > 1:
            for name in sorted(self._values):
                self._values[name] = world.mean(self._values[name].double()).float()

    @property
    def values(self) -> dict[str, Tensor]:
        """(k, d_in) float32 by layer, on the CPU."""
        return {name: value.cpu() for name, value in self._values.items()}

    @values.setter
    def values(self, given: Mapping[str, Tensor]) -> None:
        self._values = dict(given)
