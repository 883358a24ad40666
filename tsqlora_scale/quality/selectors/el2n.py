"""``sampling.selector: el2n``: the samples that the model, a little trained, is most wrong about.

Paul, Ganguli and Dziugaite, *Deep Learning on a Data Diet*, 2107.07075: the length of the error vector
``|p(x) - y|``, of few epochs, a mean over ten initialisations; here of one. Where labels are wrong these are the ones
with the largest error: the paper leaves the very hardest out then, and so should ``task.dataset.exclude``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tsqlora_scale.quality.selectors.forward_selector import ForwardSelector
from tsqlora_scale.quality.selectors.ranked import Rating
from tsqlora_scale.tasks.batch import class_logits


class El2nSelector(ForwardSelector):
    """Keeps the largest errors after the warm-up. Needs classes."""

    def rate(self, module: nn.Module) -> Rating:
        """One forward pass over the pool."""
        errors, _ = self.seen(module, error_lengths, name="el2n", frozen=False, with_query=False)
        return Rating(errors[:, 0].astype("float64"))


def error_lengths(module: nn.Module, batch: Any) -> Tensor:
    """``|softmax(logits) - one-hot(label)|_2`` of every sample, (B, 1) float32."""
    probabilities = class_logits(module(**batch.inputs).logits, batch).float().softmax(-1)
    wanted = torch.nn.functional.one_hot(batch.targets, probabilities.shape[-1])
    errors: Tensor = torch.linalg.vector_norm(probabilities - wanted, dim=-1, keepdim=True)
    return errors
