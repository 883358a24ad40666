"""Logits of the places that a loss is taken at, and of no others.

Of a prompt and its answer, and of padding, most logits are never looked at: at a vocabulary of 128,000 those of
4 x 1024 tokens are 1 GB in bf16, and a backward pass takes several times that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tsqlora_scale.tasks.batch import Batch
from tsqlora_scale.tasks.objectives.causal import CausalObjective
from tsqlora_scale.tasks.objectives.chat import ChatObjective
from tsqlora_scale.tasks.objectives.seq2seq import Seq2SeqObjective

#: Numbers that must be saved before it is done: small products are as fast whole.
WORTH = 2**22


@contextmanager
def needed_logits(module: Any, places: Tensor | None, shape: torch.Size | None) -> Iterator[None]:
    """Inside, the output layer of ``module`` is called on some places alone: its logits are (1, n, V).

    What models do to their logits afterwards (a bias, a scale, a soft cap) they do to every place for itself. Where the
    output layer is adapted, where the model does not call it on hidden states of shape (B, T, width), and where little
    would be saved, logits are those of all places, (B, T, V).

    Args:
        module: the model, however wrapped; anything else is left alone.
        places: positions (n,) in the flattened (B, T); None: all of them.
        shape: (B, T); None with places of None.
    """
    head = None if places is None else _output_layer(module)
    if (
        head is None
        or places is None
        or shape is None
        or (shape.numel() - len(places)) * int(head.out_features) < WORTH
    ):
        yield
        return

    def keep(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0] if args else None
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != shape:
            return None
        return (hidden.flatten(0, 1).index_select(0, places).unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def at_places(logits: Tensor, batch: Batch) -> Tensor:
    """The logits at ``batch.places``, (n, V), of those of these places alone, (1, n, V), or of all, packed or not."""
    assert batch.places is not None
    if logits.shape[:2] == batch.targets.shape:
        return logits.flatten(0, 1).index_select(0, batch.places)
    if batch.packing is not None and logits.shape[:2] == batch.packing.shape:
        return logits.flatten(0, 1).index_select(0, batch.packing.places)
    assert logits.shape[:2] == (1, len(batch.places)), "neither the logits of all places nor those of the needed ones"
    return logits[0]


def _output_layer(module: Any) -> nn.Linear | None:
    """The layer that gives the logits, unless it is adapted; None where there is none to be found."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # heavy, and nothing to processes that only tokenize

    find = getattr(module, "get_output_embeddings", None)
    found = find() if callable(find) else None
    return found if isinstance(found, nn.Linear) and not isinstance(found, BaseTunerLayer) else None


def token_shift(objective: Any) -> int | None:
    """How many places before its target a logit is; None where an objective's losses are not of tokens, or are a
    user's own."""
    own = getattr(type(objective), "losses", None)
    if own in (CausalObjective.losses, ChatObjective.losses):
        return 1
    return 0 if own is Seq2SeqObjective.losses else None
