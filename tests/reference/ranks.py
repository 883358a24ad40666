"""Slow, obvious versions of what ``tsqlora_scale.ranks`` computes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tsqlora_scale.model.adapters.lora import ADAPTER, lora_layers


def sensitivity(model: nn.Module, groups: Sequence[Callable[[nn.Module], Tensor]], estimator: str) -> dict[str, float]:
    """S_l by unfreezing everything and running autograd once a group.

    Each of ``groups`` maps the model to that group's mean loss (its share of the step's loss, times N / n).
    """
    model = copy.deepcopy(model).requires_grad_(True)
    layers = lora_layers(model)
    result = dict.fromkeys(layers, 0.0)
    for loss in groups:
        model.zero_grad()
        loss(model).backward()
        for name, layer in layers.items():
            base = layer.get_base_layer().weight
            if estimator == "fisher":
                value = base.grad.double().square().sum()
            elif estimator == "adapter":
                if ADAPTER not in layer.lora_A:
                    continue
                pair = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
                value = sum((p.detach() * p.grad).double().abs().mean() for p in pair)
            else:
                value = (base.detach().double() * base.grad.double()).abs().mean()
            result[name] += float(value) / len(groups)
    return result


def water_level(sensitivity: Sequence[float], costs: Sequence[int], low: int, high: Sequence[int], budget: int):
    """clip(lambda S_l, low, high_l) of total cost ``budget``, lambda by bisection. For positive S."""

    def shares(level: float) -> list[float]:
        return [min(max(level * s, low), h) for s, h in zip(sensitivity, high, strict=True)]

    below, above = 0.0, 1e12
    for _ in range(200):
        middle = (below + above) / 2
        spent = sum(c * x for c, x in zip(costs, shares(middle), strict=True))
        below, above = (middle, above) if spent < budget else (below, middle)
    return shares(above)


def nearest_ranks(shares: Sequence[float], low: int, high: Sequence[int], budget: int) -> list[int]:
    """Of all integer vectors of the right total, the nearest to ``shares``; of those, the one that favours the first.

    Largest remainder is exactly this (Hamilton's apportionment minimises the squared distance).
    """
    choices = itertools.product(*(range(low, h + 1) for h in high))
    right = [c for c in choices if sum(c) == budget]
    return list(min(right, key=lambda c: (round(sum((r - x) ** 2 for r, x in zip(c, shares, strict=True)), 9),
                                          [-r for r in c])))  # fmt: skip


def best_approximation(product: Tensor, rank: int) -> Tensor:
    """Eckart-Young from a full SVD of the full matrix."""
    u, s, vh = torch.linalg.svd(product.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def weight_gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """dL/dW (d_out, d_in) of every adapted layer, by unfreezing everything."""
    model = copy.deepcopy(model).requires_grad_(True)
    loss(model).backward()
    weights = {name: layer.get_base_layer() for name, layer in lora_layers(model).items()}
    return {n: m.weight.grad.T if type(m).__name__ == "Conv1D" else m.weight.grad for n, m in weights.items()}


def outside(rows: Tensor, of: Tensor) -> Tensor:
    """The parts of ``rows`` (n, d) that no combination of the rows of ``of`` (m, d) gives."""
    rows, of = rows.double(), of.double()
    return rows - rows @ torch.linalg.pinv(of) @ of


def best_division(
    worths: Sequence[Sequence[float]], costs: Sequence[int], low: Sequence[int], high: Sequence[int], budget: int
) -> float:
    """The most that ranks within their bounds and the budget can be worth together, by trying all of them."""
    best = 0.0
    for ranks in itertools.product(*(range(lo, hi + 1) for lo, hi in zip(low, high, strict=True))):
        if sum(cost * rank for cost, rank in zip(costs, ranks, strict=True)) <= budget:
            best = max(best, sum(sum(values[:rank]) for values, rank in zip(worths, ranks, strict=True)))
    return best


def target_values(learned: Tensor, gradient: Tensor, eta: float) -> list[float]:
    """Squared singular values of dW - eta G, both (d_out, d_in) and whole."""
    values: list[float] = torch.linalg.svdvals(learned.double() - eta * gradient.double()).square().tolist()
    return values
