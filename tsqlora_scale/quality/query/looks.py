"""What is taken of every sample in a forward pass: features of some layers, and its target or its loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora_scale.common.random_streams import philox
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality.features.forward_pass import ForwardPass
from tsqlora_scale.quality.features.hidden_states import mean_states, with_states
from tsqlora_scale.quality.pool import Pool

#: Layers that are looked at, of the model's upper half.
LAYERS = 4
#: Features of a layer; wider ones are projected at random.
WIDTH = 768


@dataclass(frozen=True)
class Shape:
    """What the numbers of a sample are: L x R x d features, and then its target or its loss.

    Attributes:
        kind: of the task: ``classes``, ``number`` or ``text``.
    """

    layers: int
    regions: int
    width: int
    kind: str

    def split(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, L, R, d) features and (n,) targets or losses, of (n, ...) numbers."""
        features = numbers[:, :-1].reshape(len(numbers), self.layers, self.regions, self.width)
        return features, numbers[:, -1]


class FeatureLook:
    """Features and target of the samples of a batch, by one forward.

    Attributes:
        shape: of what it gives; None before the first batch.
    """

    def __init__(self, pool: Pool[Any], *, seed: int) -> None:
        self._pool, self._seed = pool, seed
        self._projection: Tensor | None = None
        self.shape: Shape | None = None

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        """(B, L R d + 1) float32."""
        outputs = with_states(module, batch)
        states = mean_states(outputs, batch)
        states = self._narrowed(states[:, upper_layers(states.shape[1])])
        last, kind = batch.targets, "classes"
        if last.dim() == 2:
            last, kind = self._pool.losses(lambda **_: outputs, batch), "text"  # type: ignore[arg-type]
        elif last.is_floating_point():
            kind = "number"
        self.shape = Shape(states.shape[1], states.shape[2], states.shape[3], kind)
        return torch.cat([states.flatten(1), last.float()[:, None]], 1)

    def agreed_shape(self, module: nn.Module, world: World, *, max_length: int | None) -> Shape:
        """The shape of what has been given, on some rank or in a pass that was killed. A collective.

        Args:
            max_length: of the texts, in tokens; None: the task's.
        """
        shapes = [found for found in world.gather_objects(self.shape) if found is not None]
        if not shapes:  # all of it is kept of a killed pass, and nothing has been looked at in this one
            ForwardPass(module, world, max_length=max_length).run(self._pool, np.arange(1), self, name="shape")
            shapes = [found for found in world.gather_objects(self.shape) if found is not None]
        return shapes[0]

    def _narrowed(self, states: Tensor) -> Tensor:
        width = states.shape[-1]
        if width <= WIDTH:
            return states
        if self._projection is None:
            drawn = philox(self._seed, "feature projection").standard_normal((width, WIDTH), dtype=np.float32)
            self._projection = torch.from_numpy(drawn / np.sqrt(np.float32(WIDTH))).to(states.device)
        return states @ self._projection


def upper_layers(count: int) -> list[int]:
    """At most :data:`LAYERS` places of ``count`` hidden states, evenly from the middle one to the last."""
    places = np.linspace(count // 2, count - 1, min(LAYERS, count - count // 2))
    return sorted(set(places.round().astype(int).tolist()))
