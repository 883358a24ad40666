"""Per-sample losses: (summed loss, number of loss terms), both (B,) float32; the loss of a sample is their ratio.

Logits are taken to float32 first: a bf16 log-softmax is off in the third digit, and these losses are compared
with each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tsqlora_scale.tasks.batch import IGNORED

#: Logits of which the cross-entropy is taken in parts, and about how many of them at once.
MANY, PART = 2**24, 2**22


def loss_terms(targets: Tensor) -> Tensor:
    """Number of loss terms of every sample (B,) float32: its target tokens, or 1 for a class or a number."""
    if targets.dim() == 1:
        return torch.ones_like(targets, dtype=torch.float32)
    return (targets != IGNORED).sum(dim=1).float()


def on_known_terms(losses: Tensor, counts: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
    """Losses that an objective of one's own has summed over ``counts`` terms, as if over ``terms``, by which a step is
    normalised before any forward: their ratios, the samples' own losses, stay. All (B,)."""
    rescaled = losses / torch.where(counts > 0, counts, 1) * terms
    return torch.where(counts == terms, losses, rescaled), terms


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
    # a GPU is waited for, to know how many they are
    places = torch.nonzero(targets.flatten() != IGNORED).squeeze(1)
    return losses_at(logits.flatten(0, 1).index_select(0, places), targets, places)


def losses_at(logits: Tensor, targets: Tensor, places: Tensor, *, shift: int = 0) -> tuple[Tensor, Tensor]:
    """:func:`token_losses` of logits (n, V) at ``places`` (n,) of the flattened (B, T), each of the token ``shift``
    places on: those of all targets (B, T) that a loss is taken at."""
    values = token_cross_entropy(logits, targets.flatten().index_select(0, places + shift))
    per_token = torch.zeros(targets.numel(), dtype=torch.float32, device=logits.device)
    return per_token.index_put((places,), values).view(targets.shape).sum(dim=1), loss_terms(targets)


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (n,) float32 of logits (n, V) and token ids (n,); of many logits a stretch at a time."""
    if logits.numel() < MANY:
        return F.cross_entropy(logits.float(), targets, reduction="none")
    values: Tensor = _CrossEntropyInParts.apply(logits, targets)  # type: ignore[no-untyped-call]
    return values


class _CrossEntropyInParts(torch.autograd.Function):
    """Takes to float32 :data:`PART` logits at once, and keeps of them what the softmax is divided by. Autograd's own
    would keep all log-probabilities, and make three copies in float32 on the way."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        sums = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        values = torch.empty_like(sums)
        for part in _parts(logits):
            numbers = logits[part].float()
            sums[part] = numbers.logsumexp(dim=1)
            values[part] = sums[part] - numbers.gather(1, targets[part, None]).squeeze(1)
        ctx.save_for_backward(logits, targets, sums)
        return values

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None]:
        logits, targets, sums = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for part in _parts(logits):
            shares = (logits[part].float() - sums[part, None]).exp_()
            shares.scatter_add_(1, targets[part, None], torch.full_like(sums[part, None], -1.0))
            gradient[part] = shares.mul_(delta[part, None])
        return gradient, None


def _parts(logits: Tensor) -> Iterator[slice]:
    rows = max(PART // logits.shape[1], 1)
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)
