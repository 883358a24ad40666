"""The repeated blocks of a model from the bottom to the top, found by the names of its modules.

One numbering serves learning rates by depth (``train.lr_decay``) and the choice of layers (``adapter.layers``): from 0
at the bottom, and in an encoder-decoder through the encoder and then the decoder.
"""

from __future__ import annotations

import re

from peft import PeftModel
from torch import nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import Config
from tsqlora_scale.model.heads import head_modules
from tsqlora_scale.model.weight_files import PREFIX

#: A block's own name: up to the first number, or several at once (Funnel's blocks are numbered within their size).
_BLOCK = re.compile(r"^(.*?\.\d+(?:\.\d+)*)\.")
#: What comes after the blocks of a stack, by its name in the stack.
_LAST = re.compile(r"final|^norm$|layer_norm$|^ln_f$|project_out")
#: What PEFT puts beside the base.
_BESIDE = ("modules_to_save", "original_module", "prompt_encoder")


def block_of(name: str) -> str | None:
    """The block that a module or parameter of that name lies in; None outside of all blocks.

    >>> block_of("bert.encoder.layer.3.attention.self.query.weight")
    'bert.encoder.layer.3'
    """
    found = _BLOCK.match(name.removeprefix(PREFIX))
    return found[1] if found and not any(part in name for part in _BESIDE) else None


def blocks_of(model: nn.Module) -> list[str]:
    """Names of the model's blocks, the lowest first: those that have parameters, in the order in which they are
    registered, heads aside.

    Args:
        model: bare, or with an adapter on it.
    """
    heads = head_modules(_base(model))
    names = (name.removeprefix(PREFIX) for name, _ in model.named_parameters())
    found = (block_of(name) for name in names if name.split(".")[0] not in heads)
    return list(dict.fromkeys(name for name in found if name is not None))


def _base(model: nn.Module) -> nn.Module:
    if isinstance(model, PeftModel):
        base: nn.Module = model.get_base_model()
        return base
    beneath = getattr(model, "base_model", None)  # of a PlacedModel, and of models of Transformers, which are bases
    inner = beneath["model"] if isinstance(beneath, nn.ModuleDict) else model
    return inner


def lr_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """What the learning rate of every trained parameter is multiplied by: ``decay`` to the power of its depth from the
    top (Sun et al. 2019, 1905.05583: eta^(k-1) = xi eta^k).

    The uppermost block and all above it, the head among them, have depth 0, the lowest of n blocks n - 1, embeddings
    n. What lies between blocks has the depth of the block before it, a stack's last norm that of its last block, also
    where a model registers it before the blocks (OPT). Adapters that lie beside the model, in no block, have depth 0.

    Args:
        model: with its adapter; parameters may be sharded.
        decay: in (0, 1].
    """
    blocks = {name: number for number, name in enumerate(blocks_of(model))}
    heads, number, scales = head_modules(_base(model)), -1, {}
    last = {_stack_of(block): place for block, place in blocks.items()}
    for name, param in model.named_parameters():
        own = name.removeprefix(PREFIX)
        block = block_of(name)
        is_above = own.split(".")[0] in heads or any(part in name for part in _BESIDE)
        number = blocks.get(block or "", number)
        if not param.requires_grad:
            continue
        place = number
        if block not in blocks:
            is_below = re.search(r"embed|\bwte\b|\bwpe\b", own) is not None
            stack, _, child = own.rpartition(".")[0].rpartition(".")
            ends = last.get(stack) if _LAST.search(child) else None
            place = len(blocks) - 1 if is_above or not blocks else -1 if is_below else number if ends is None else ends
        scales[name] = decay ** max(len(blocks) - 1 - place, 0)
    return scales


def _stack_of(block: str) -> str:
    """The module that has the list of blocks in which one is: ``model.decoder`` of ``model.decoder.layers.3``."""
    return block.rpartition(".")[0].rpartition(".")[0]


def chosen_blocks(model: nn.Module, layers: list[int] | str) -> set[str]:
    """Names of the blocks that ``adapter.layers`` chooses.

    Args:
        model: bare.
        layers: numbers of blocks, or ``top:K``.

    Raises:
        UserError: the model has no such blocks.
    """
    blocks = blocks_of(model)
    key = f"adapter.layers={layers!r}"
    if not blocks:
        raise UserError(f"{key}: {type(model).__name__} has no repeated blocks; remove it")
    if isinstance(layers, str):
        count = int(layers.removeprefix("top:"))
        if count > len(blocks):
            raise UserError(f"{key}: {type(model).__name__} has {len(blocks)} blocks; give top:{len(blocks)} or fewer")
        return set(blocks[-count:])
    outside = [number for number in layers if number >= len(blocks)]
    if outside:
        raise UserError(
            f"{key}: {type(model).__name__} has no block {outside[0]}; its blocks are 0 ({blocks[0]}) to "
            f"{len(blocks) - 1} ({blocks[-1]})"
        )
    return {blocks[number] for number in layers}


def check_depth(config: Config, model: nn.Module) -> None:
    """What goes by blocks, ``train.lr_decay``, ``adapter.layers`` and LoRATRF's filters, against a bare model.

    Raises:
        UserError: the model has no blocks to tell depths by, or they cannot be told.
    """
    decay, layers = config.train.lr_decay, config.adapter.layers
    if decay < 1 and not blocks_of(model):
        raise UserError(f"train.lr_decay={decay:g}: {type(model).__name__} has no repeated blocks; set it to 1")
    asked = {
        f"train.lr_decay={decay:g}": decay < 1,
        f"adapter.layers={layers!r}": layers is not None,
        "adapter.type='loratrf'": config.adapter.type == "loratrf",
    }
    key = next((key for key, is_asked in asked.items() if is_asked), None)
    if key is not None and (parts := _parts_of_blocks(model)):
        raise UserError(
            f"{key}: {type(model).__name__} keeps the parts of its blocks in lists of their own ({', '.join(parts)}), "
            "so that what is a block cannot be told; remove it, or choose another model"
        )


def _parts_of_blocks(model: nn.Module) -> list[str]:
    """Lists of one module that have as many entries each, of which a block is one of every list (XLM)."""
    lists: dict[str, dict[str, set[str]]] = {}
    for name in blocks_of(model):
        place, _, number = name.rpartition(".")
        parent, _, own = place.rpartition(".")
        lists.setdefault(parent, {}).setdefault(own, set()).add(number)
    for found in lists.values():
        alike = [own for own, numbers in found.items() if len(numbers) > 1 and [*found.values()].count(numbers) > 1]
        if alike:
            return sorted(alike)
    return []
