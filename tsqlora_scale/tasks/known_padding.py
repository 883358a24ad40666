"""Tell a model's masks what the host knows of a batch's padding, so that a GPU is not waited for to find out.

Transformers' masks for ``scaled_dot_product_attention`` look whether anything is padded at all, once or twice a forward
pass: a read of the device. The host has made the mask and knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

#: ``none``: all positions are tokens; ``some``: not; ``after``: not, but those that are not come after all tokens of
#: their row, where a decoder that looks back alone never sees them; ``source``: the same of an encoder-decoder's
#: decoder, whose batch has a mask of the source alone.
Padding = Literal["none", "some", "after", "source"]
_NAMES = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")


def padding_of(inputs: dict[str, Tensor], *, looks_back: bool) -> Padding | None:
    """The padding of a batch on the host; None where it has no mask, or several.

    Args:
        looks_back: whether what is masked causally is padded on the right.
    """
    mask = inputs.get("attention_mask")
    if mask is None or sum(name.endswith("attention_mask") for name in inputs) > 1:
        return None
    if looks_back and "decoder_input_ids" in inputs:
        return "source"
    if bool(mask.all()):
        return "none"
    return "after" if looks_back else "some"


@contextmanager
def known_padding(padding: Padding | None, shape: torch.Size | None) -> Iterator[None]:
    """Inside, masks of padding of this shape (B, T) are known to be as ``padding`` says. Masks are the same as ever,
    but that a causal one is left to the kernel where padding comes after all tokens: so flash attention takes such
    batches.

    Args:
        padding: of the batch; None: nothing is known, and the model looks.
        shape: of its mask.
    """
    from transformers import masking_utils

    present = [name for name in _NAMES if hasattr(masking_utils, name)] if padding is not None else []
    before: dict[str, Callable[..., bool]] = {name: getattr(masking_utils, name) for name in present}
    for name, look in before.items():
        setattr(masking_utils, name, _knowing(look, padding, shape, causal=name == _NAMES[0]))
    try:
        yield
    finally:
        for name, look in before.items():
            setattr(masking_utils, name, look)


def _knowing(
    look: Callable[..., bool], padding: Padding | None, shape: torch.Size | None, *, causal: bool
) -> Callable[..., bool]:
    """Whether a mask can be left out: ``look`` for masks of another shape, and where no padding is to be seen."""

    def ignore(padding_mask: Tensor | None, *args: Any, **kwargs: Any) -> bool:
        if causal and padding == "source":  # what the model itself takes for the target's mask is all ones
            return look(None, *args, **kwargs)
        if padding_mask is None or padding_mask.shape != shape:
            return look(padding_mask, *args, **kwargs)
        if padding == "none" or (causal and padding == "after"):
            return look(None, *args, **kwargs)
        return False

    return ignore
