"""Per-sample losses: (summed loss, number of loss terms), both (B,) float32; the loss of a sample is their ratio.

Logits are taken to float32 first: a bf16 log-softmax is off in the third digit, and these losses are compared
with each other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tsqlora_scale.tasks.batch import IGNORED


def loss_terms(targets: Tensor) -> Tensor:
    """Number of loss terms of every sample (B,) float32: its target tokens, or 1 for a class or a number."""
    if targets.dim() == 1:
        return torch.ones_like(targets, dtype=torch.float32)
    return (targets != IGNORED).sum(dim=1).float()


def class_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits (B, C) and class ids (B,)."""
    return F.cross_entropy(logits.float(), targets, reduction="none"), loss_terms(targets)


def squared_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of predictions (B, 1) and numbers (B,)."""
    return (logits.float().squeeze(-1) - targets).square(), loss_terms(targets)


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Token cross-entropy of logits (B, T, V) and token ids (B, T), summed over each sample's own target tokens.

    Position t of the logits is scored against position t of the targets. Only positions with a target are taken
    to float32: of a causal model's (B, T, V) logits most belong to the prompt.
    """
    counted = torch.nonzero(targets != IGNORED, as_tuple=True)  # once: a GPU is waited for to know how many they are
    per_token = torch.zeros(targets.shape, dtype=torch.float32, device=logits.device)
    per_token[counted] = F.cross_entropy(logits[counted].float(), targets[counted], reduction="none")
    return per_token.sum(dim=1), loss_terms(targets)
