"""The last layer's hidden states of a sample, pooled over its tokens: one vector a sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tsqlora_scale.quality.features.hidden_states import by_sample, with_states
from tsqlora_scale.tasks.batch import IGNORED, Batch


class LastLayerLook:
    """Mean of the last layer's hidden states over a sample's tokens, by one forward.

    Tokens of source and target both, where a text follows a text. A model of an encoder and a decoder that answers in
    text is looked at in its decoder, whose states have seen the source.

    Args:
        by_position: a token counts as much as its place, 1, 2, 3, ...: in a causal model the later ones have seen more
            of the text (Ivison et al., 2503.01807). Else all alike.
    """

    def __init__(self, *, by_position: bool) -> None:
        self._by_position = by_position

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        """(B, d) float32."""
        states, mask = last_states(with_states(module, batch), batch)
        weights = torch.ones(states.shape[:2], device=states.device) if mask is None else mask.float()
        if self._by_position:
            weights = weights * weights.long().cumsum(1)  # of floats it is not deterministic on a GPU, and refused
        total = (states.float() * weights.unsqueeze(-1)).sum(1)
        return total / weights.sum(1, keepdim=True).clamp(min=1)


def last_states(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """States (B, T, d) of the last layer, and which of the positions are the sample's, (B, T); None: all.

    Args:
        outputs: of :func:`.with_states`.
    """
    attended = batch.inputs.get("attention_mask")
    if getattr(outputs, "encoder_hidden_states", None) is None:
        return by_sample(outputs.hidden_states[-1], batch), attended
    if batch.targets.dim() == 2:
        return outputs.decoder_hidden_states[-1], batch.targets != IGNORED
    return outputs.encoder_hidden_states[-1], attended
