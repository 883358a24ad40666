"""What every rank of a layer is worth, by a local model of the loss (``allocation.policy: gain``).

Let dW be what a layer has learned, G the gradient of the loss by its weight, and take the loss near the present point
for its gradient and a curvature 1 / eta that is the same everywhere. Then it is, up to a constant,
|| dW' - T ||_F^2 / (2 eta) of another dW', with the target T = dW - eta G: what is held already, and where the
gradient wants to go from there. A layer of rank r comes nearest to it by T's r leading singular directions (Eckart and
Young), and the r-th rank is worth sigma_r(T)^2 / (2 eta). Values of a layer fall, so that taking the dearest ranks of
all layers first, per parameter where parameters are paid for, is the best division of any budget under this model.

Neither G nor T is ever formed: Omega dW = scaling (Omega B) A, and Omega G is the sketch of
:mod:`.gradient_sketches`; E[(Omega T)^T (Omega T)] = k T^T T.

A gradient of some samples is mostly noise, and noise has singular values, too. So there are two sketches, of alternate
steps: directions are found in the one target, and valued in the other, u^T T_2 v, where noise adds nothing in the mean.

eta is where the gradient's wish counts as much as all that has been learned: eta^2 is the squared norm of dW over all
layers, by that of G, of which noise is left out in the same way. At the start, where dW = 0, its size is of no account.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor
from torch.linalg import svd

#: What two sketches of alternate steps hold of every layer: Omega G, (k, d_in) each.
Halves = Mapping[str, tuple[Tensor, Tensor]]


def rank_worths(held: Mapping[str, Tensor], halves: Halves) -> dict[str, tuple[float, ...]]:
    """What ranks 1, 2, ... of every layer are worth, falling; k or fewer of them, in squared units of dW.

    Args:
        held: Omega dW by layer, (k, d_in).
        halves: Omega G of alternate steps, by the same layers.
    """
    eta = step_length(held, halves)
    if not any(bool(value.any()) for value in held.values()):
        eta = 1.0
    found = {}
    for name, value in held.items():
        first, second = (value.double() - eta * half.double() for half in halves[name])
        values = (_valued(first, by=second) + _valued(second, by=first)) / (2 * len(value))
        found[name] = tuple(values.sort(descending=True).values.tolist())
    return found


def step_length(held: Mapping[str, Tensor], halves: Halves) -> float:
    """eta; 0 where the two halves have no signal in common."""
    learned = math.fsum(float(value.double().square().sum()) for value in held.values())
    signal = math.fsum(float((one.double() * other.double()).sum()) for one, other in halves.values())
    return math.sqrt(learned / signal) if signal > 0 else 0.0


def _valued(target: Tensor, *, by: Tensor) -> Tensor:
    """Squares of what ``by`` has in the singular directions of ``target``, (k,) float64; 0 where they disagree."""
    u, _, vh = svd(target, full_matrices=False)
    common: Tensor = ((u.T @ by) * vh).sum(1)
    return common.clamp_min(0.0).square()


def held_part(projection: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Omega dW, (k, d_in) float64, of a layer's factors A (r, d_in) and B (d_out, r) and Omega (k, d_out)."""
    return scaling * (projection.double() @ b.double()) @ a.double()
