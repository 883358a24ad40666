"""What survives a rebuild or a checkpoint: full parameters and optimizer moments, by name."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class ParamState:
    """One trainable parameter, whole (not a shard), float32, on the CPU.

    ``exp_avg`` and ``exp_avg_sq`` are Adam's moments, of the shape of ``value``; zeros before the first step.
    """

    value: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    @classmethod
    def fresh(cls, value: torch.Tensor) -> ParamState:
        """A parameter without a history."""
        return cls(value, torch.zeros_like(value), torch.zeros_like(value))


@dataclass
class TrainState:
    """All trainable parameters by name, and the number of optimizer steps behind their moments."""

    params: dict[str, ParamState] = field(default_factory=dict)
    optimizer_steps: int = 0
