"""A task of one's own: classification by a focal loss, which lets samples that are right already count less.

    python launch/train.py --config configs/quickstart.yaml task.objective=examples/task.py:FocalLoss

An objective turns rows into tensors, logits into a loss for every sample, and a model into answers. This one changes
the loss alone and takes the rest from the package. Scores, draws and ranks follow the new loss by themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsqlora_scale.tasks.losses import class_losses
from tsqlora_scale.tasks.objectives.label_heads import LabelObjective


class FocalLoss(LabelObjective):
    """``(1 - p)^2`` times the cross-entropy, with p the probability of the right class (Lin et al. 2017)."""

    gamma = 2.0

    def losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss and number of loss terms of every sample, (B,) each: one term a sample."""
        losses, terms = class_losses(logits, targets)
        return (1 - torch.exp(-losses)) ** self.gamma * losses, terms
