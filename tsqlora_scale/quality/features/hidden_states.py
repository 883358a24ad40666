"""Mean-pooled hidden states of the base, the frozen features of a sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.tasks.batch import IGNORED, Batch
from tsqlora_scale.tasks.needed_logits import needed_logits
from tsqlora_scale.tasks.packing import known_samples


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Inside, adapted layers are what they are in the base. Nothing else of them changes, ``requires_grad`` neither.

    Raises:
        UserError: their weights have lost what factors started as (``adapter.init``).
    """
    if any(hasattr(part, "start_A") for part in module.modules()):
        raise UserError("adapter.init takes factors out of the base, which is to be looked at alone here; remove it")
    layers: list[Any] = [part for part in module.modules() if hasattr(part, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def with_states(module: Any, batch: Batch) -> Any:
    """A forward on the batch, laid end to end where it is packed: what ``module`` gives with its hidden states, and
    with the logits that losses are of."""
    packing = batch.packing
    if packing is None:
        with needed_logits(module, batch.places, None if batch.places is None else batch.shape):
            return module(**batch.inputs, output_hidden_states=True)
    with known_samples(packing), needed_logits(module, packing.places, packing.shape):
        return module(**packing.inputs, output_hidden_states=True)


def by_sample(states: Tensor, batch: Batch) -> Tensor:
    """Hidden states of the batch as its samples' rows, (B, T, d)."""
    packing = batch.packing
    return packing.rows(states) if packing is not None and packing.holds(states) else states


def mean_states(outputs: Any, batch: Batch) -> Tensor:
    """Mean hidden states of a batch's samples, (B, L, R, d) float32, by layer (the embeddings first) and region.

    A text that is classified has one region (R = 1): all its tokens. Where a text follows a text there are two: the
    source and the target; in a model of an encoder and a decoder the encoder's states and the decoder's.

    Args:
        outputs: of :func:`with_states`.
    """
    targets = batch.targets if batch.targets.dim() == 2 else None
    attended = batch.inputs.get("attention_mask")
    encoded = getattr(outputs, "encoder_hidden_states", None)
    if encoded is not None:
        # a classifier of this kind reads the source a second time in its decoder: of that, nothing
        decoded = outputs.decoder_hidden_states
        read = attended if targets is None else targets != IGNORED
        depth = min(len(encoded), len(decoded))
        regions = [(encoded[-depth:], attended), (decoded[-depth:], read)][: 1 if targets is None else 2]
    else:
        states = outputs.hidden_states
        if targets is None:
            regions = [(states, attended)]
        else:  # the targets stand at the answer's own positions
            answered = targets != IGNORED
            asked = ~answered if attended is None else attended.bool() & ~answered
            regions = [(states, asked), (states, answered)]
    return torch.stack(
        [torch.stack([_mean(by_sample(state, batch), mask) for state in layers], 1) for layers, mask in regions], 2
    )


def _mean(states: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (B, T, d) over the positions in (B, T), float32; zero where there is none."""
    if mask is None:
        return states.float().mean(1)
    weights = mask.unsqueeze(-1).float()
    return (states.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
