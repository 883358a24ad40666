"""Which layers of a base can be adapted, which of them are, and what of its weights lies in no such layer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.model.block_depths import block_of, chosen_blocks

#: Weights outside of linear layers are worth a word above this share of all.
WORTH_A_WORD = 0.05


def is_linear(module: nn.Module) -> bool:
    """Whether PEFT adapts a module as a linear layer: torch's, what derives from it, or GPT-2's (weight transposed)."""
    return isinstance(module, nn.Linear | Conv1D)


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer that is not packed, whichever way its weight lies."""
    rows, columns = module.weight.shape  # type: ignore[misc, union-attr]
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def transposed_layers(model: nn.Module) -> list[str]:
    """GPT-2's linear layers whose weights lie the other way round in a 4-bit model, as in all 4-bit layers."""
    return [name for name, module in model.named_modules() if getattr(module, "source_cls", None) is Conv1D]


def transpose_again(model: nn.Module, names: Collection[str]) -> None:
    """Make layers that were 4-bit ones and are torch's own now what their architecture has there."""
    for name in names:
        linear: Any = model.get_submodule(name)
        layer = Conv1D(linear.out_features, linear.in_features).to(linear.weight)
        layer.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
        layer.bias = linear.bias
        model.set_submodule(name, layer)


def expert_kind(name: str) -> str:
    """The same for all experts of a block: a few tokens do not visit them all."""
    return re.sub(r"(experts?)\.(expert_)?\d+\.", r"\1.N.", name)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def is_idle(module: str, layers: Iterable[str], unreached: Collection[str]) -> bool:
    """Whether a module has linear layers, and text passes through none of them (a pooler that the head leaves out).

    Args:
        layers: names of all linear layers.
        unreached: those that text does not pass through.
    """
    inside = [name for name in layers if name == module or name.startswith(f"{module}.")]
    return bool(inside) and all(name in unreached for name in inside)


def in_blocks(name: str) -> bool:
    """Whether a layer of that name is part of a repeated block."""
    return re.search(r"\.\d+\.", name) is not None


def heads_of(model: nn.Module) -> list[str]:
    """Linear layers outside the repeated blocks (classifier, pooler, lm_head): never quantised."""
    return [name for name in linear_layers(model) if not in_blocks(name)]


def resolve_targets(
    model: nn.Module,
    targets: list[str] | str,
    *,
    unreached: Collection[str] = frozenset(),
    layers: list[int] | str | None = None,
) -> list[str]:
    """Full names of the linear layers to adapt.

    ``auto`` is every linear layer inside the repeated blocks (attention and feed-forward), which for BERT-like
    models is the paper's choice: query, key, value, attention output, intermediate, output. A list holds name
    suffixes; inside the blocks they win over the same names outside (``dense`` is not the pooler's). Neither takes
    layers in which an adapter would not train: those of ``unreached``, and those whose weight is read past them.
    ``loratrf`` is that paper's choice (:func:`.blocks.papers_choice`).

    Args:
        unreached: linear layers that the logits do not depend on (:mod:`tsqlora_scale.model.probe`).
        layers: ``adapter.layers``: of these blocks alone.

    Raises:
        UserError: when a suffix matches no linear layer, or only such layers; or none of them lies in ``layers``.
    """
    chosen = _matching(model, targets, unreached)
    if layers is None:
        return chosen
    blocks = chosen_blocks(model, layers)
    inside = [name for name in chosen if block_of(name) in blocks]
    if not inside:
        raise UserError(
            f"adapter.layers={layers!r}: none of the layers of adapter.target_modules ({kinds_of(chosen)}) lies in "
            "these blocks and would train; choose other blocks or layers"
        )
    return inside


def _matching(model: nn.Module, targets: list[str] | str, unreached: Collection[str]) -> list[str]:
    """:func:`resolve_targets` in all blocks."""
    layers = linear_layers(model)
    idle = set(unreached) | read_past(model)
    blocks = [name for name in layers if in_blocks(name)]
    if targets in ("auto", "loratrf"):
        chosen = [name for name in blocks if name not in idle]
        if targets == "loratrf":
            from tsqlora_scale.model.blocks import papers_choice

            return papers_choice(model, chosen)
        if not chosen:
            raise UserError(
                "adapter.target_modules='auto' found no linear layer inside repeated blocks of "
                f"{type(model).__name__} that would train; name the layers"
            )
        return chosen
    found: set[str] = set()
    for target in targets:
        matches: list[str] = []
        for names in (blocks, list(layers)):
            matches = matches or [name for name in names if name == target or name.endswith(f".{target}")]
        if not matches:
            known = sorted({name.rsplit(".", 1)[-1] for name in layers})
            raise UserError(
                f"adapter.target_modules: {target!r} matches no linear layer of {type(model).__name__}; "
                f"known: {', '.join(known)}"
            )
        trained = set(matches) - idle
        if not trained:
            raise UserError(
                f"adapter.target_modules: {target!r} would never train: {kinds_of(matches)} of {type(model).__name__} "
                f"{'gets' if len(matches) == 1 else 'get'} no gradient from text; leave it out"
            )
        found |= trained
    return sorted(found)


def read_past(model: nn.Module) -> set[str]:
    """Linear layers of state-space mixers (Mamba) whose weight is read without a call of the layer.

    Their fused kernels take ``out_proj.weight`` and go past whatever stands around the layer; which path runs depends
    on the machine, so that a pass on this one cannot tell.
    """
    found = set()
    for name, mixer in model.named_modules():
        if not {"A_log", "D"} <= dict(mixer.named_parameters(recurse=False)).keys():
            continue
        code = inspect.getsource(type(mixer))
        for inner, module in mixer.named_children():
            if is_linear(module) and re.search(rf"\bself\.{re.escape(inner)}\.weight\b(?!\.)", code):
                found.add(f"{name}.{inner}")
    return found


def outside_linear_layers(model: nn.Module) -> dict[str, int]:
    """Elements by name of the large parameters inside repeated blocks that belong to no layer of torch's: experts."""
    found = {}
    for name, module in model.named_modules():
        if is_linear(module) or type(module).__module__.startswith("torch."):
            continue
        for inner, param in module.named_parameters(recurse=False):
            if param.dim() > 1 and in_blocks(f"{name}.{inner}"):
                found[f"{name}.{inner}"] = param.numel()
    return found


def note_on_weights(model: nn.Module, *, is_4_bit: bool, bytes_each: int) -> str | None:
    """What a user should know of weights that are neither adapted nor quantised; None where they are few."""
    found = outside_linear_layers(model)
    total, count = sum(param.numel() for param in model.parameters()), sum(found.values())
    if count < WORTH_A_WORD * total:
        return None
    large = [name for name, size in found.items() if size > max(found.values()) / 100]
    packed = f", and in 4 bits neither: they take {count * bytes_each / 2**30:.2f} GiB" if is_4_bit else ""
    return (
        f"{count / total:.0%} of the model's weights ({count:,} in {kinds_of(large)}) are not in linear layers: "
        f"they stay as they are, without an adapter{packed}"
    )


def kinds_of(names: Collection[str], most: int = 4) -> str:
    """Layers' names with ``*`` for their numbers, the first of them, for messages."""
    kinds = sorted({re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name in names})
    return ", ".join(kinds[:most]) + (f" and {len(kinds) - most} more" if len(kinds) > most else "")
