"""How far a model's logits are from another's: what self-distillation adds to the loss (Xu et al. 2020, 2002.10345)."""

from __future__ import annotations

import torch
from torch import Tensor

from tsqlora_scale.tasks.batch import IGNORED
from tsqlora_scale.tasks.losses import loss_terms


def squared_gaps(logits: Tensor, others: Tensor, targets: Tensor, places: Tensor | None = None) -> Tensor:
    """Summed squared distance of every sample's logits, a mean over classes or vocabulary, over its loss terms: (B,)
    float32. Divided by the number of terms it is the sample's mean squared error.

    Args:
        logits: of the model, (B, C); or (n, V) at ``places``; or (B, T, V), of which those with a target count.
        others: what they are to be near to, of the same shape.
        targets: (B,) of labels, or (B, T) of tokens.
        places: positions (n,) in the flattened (B, T), for logits (n, V).
    """
    if places is None and targets.dim() == 2 and logits.shape[:2] == targets.shape:
        places = torch.nonzero(targets.flatten() != IGNORED).squeeze(1)
        logits, others = (rows.flatten(0, 1).index_select(0, places) for rows in (logits, others))
    gaps = (logits.float() - others.float()).square().flatten(1).mean(1)
    if places is None or targets.dim() == 1:  # a prompt's slots are places in what is read, and its targets labels
        return gaps * loss_terms(targets)
    per_token = torch.zeros(targets.numel(), dtype=torch.float32, device=gaps.device)
    return per_token.index_put((places,), gaps).view(targets.shape).sum(dim=1)
