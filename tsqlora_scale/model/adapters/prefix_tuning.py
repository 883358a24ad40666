"""Prefix tuning (2101.00190): trained keys and values before those of every attention.

They are put between a layer's own keys and values and the function that Transformers' layers hand these to. A text
keeps its positions, its masks and its cache; queries see the prefix from everywhere.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.engine.sharded import whole_shape
from tsqlora_scale.model.adapters.own_type import OwnAdapter
from tsqlora_scale.model.adapters.placement import Placement
from tsqlora_scale.model.blocks import block_names, out_features
from tsqlora_scale.model.weight_files import PREFIX

#: The name that a prefix has in its attention.
SLOT = "prefix"
#: What a kind of attention is called where a prefix comes first.
NAMES = {"eager": "prefix_eager", "sdpa": "prefix_sdpa"}
#: Names of the layers that make keys, and values, where these have layers of their own.
KEYS = ("k_proj", "key", "key_proj", "k_lin", "k")
VALUES = ("v_proj", "value", "value_proj", "v_lin", "v")


class Prefix(nn.Module):
    """P keys (P, heads d) and values (P, heads d') that every row has.

    Args:
        count: P.
        width: of keys, and of values, of all heads together.
    """

    def __init__(self, count: int, width: tuple[int, int], generator: torch.Generator) -> None:
        super().__init__()
        self._disable_adapters = False  # as PEFT's layers have it, for looks at the base alone
        self.keys = nn.Parameter(torch.empty(count, width[0]).normal_(generator=generator))
        self.values = nn.Parameter(torch.empty(count, width[1]).normal_(generator=generator))

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, T, d) with the prefix's before them, (B, heads, P + T, d)."""
        return _before(self.keys, keys), _before(self.values, values)


def _before(own: Tensor, others: Tensor) -> Tensor:
    rows, heads, _, size = others.shape
    first = own.view(len(own), heads, size).transpose(0, 1).to(others.dtype)
    return torch.cat([first.expand(rows, -1, -1, -1), others], dim=2)


def _seen(mask: Tensor | None, count: int, *, may_see: bool | float) -> Tensor | None:
    """A mask or bias (..., T) with ``count`` columns before it in which everything may be seen."""
    return None if mask is None else nn.functional.pad(mask, (count, 0), value=may_see)


def _attention(kind: str) -> Callable[..., Any]:
    """The function of a kind of attention that puts a layer's prefix first."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        inner = _own_eager(module) if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]
        prefix: Prefix = getattr(module, SLOT)
        if prefix._disable_adapters:
            return inner(module, query, key, value, attention_mask, **options)
        length, keys = query.shape[2], key.shape[2]
        key, value = prefix(key, value)
        count = key.shape[2] - keys
        causal = options.get("is_causal")
        if causal is None:
            causal = getattr(module, "is_causal", True)
        if attention_mask is None and causal and length > 1 and kind == "sdpa":  # the kernel's own, which counts from 0
            attention_mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril()[None, None]
        if attention_mask is not None:
            is_bool = attention_mask.dtype == torch.bool
            attention_mask = _seen(attention_mask, count, may_see=True if is_bool else 0.0)
        if options.get("position_bias") is not None:
            options["position_bias"] = _seen(options["position_bias"], count, may_see=0.0)
        return inner(module, query, key, value, attention_mask, **options)

    return attend


for _kind, _name in NAMES.items():
    ALL_ATTENTION_FUNCTIONS.register(_name, _attention(_kind))


def attentions(model: Any) -> dict[str, nn.Module]:
    """The modules, by name, that hand keys and values to a function of Transformers'.

    Raises:
        UserError: some block has none.
    """
    found = {name: part for name, part in model.named_modules() if _hands_over(type(part))}
    blocks = block_names(model)
    missing = [block for block in blocks if not any(name.startswith(f"{block}.") for name in found)]
    if missing or not blocks:
        raise UserError(
            f"adapter.type='prefix': a {model.config.model_type} model computes attention in a way of its own "
            f"({missing[0] if missing else 'it has no blocks'}), which takes no keys and values from elsewhere; choose "
            "adapter.type=prompt or lora"
        )
    return found


def _hands_over(kind: type) -> bool:
    try:
        source = inspect.getsource(kind.forward)  # type: ignore[attr-defined]
    except (AttributeError, OSError, TypeError):
        return False
    return "ALL_ATTENTION_FUNCTIONS.get_interface(" in source


def widths(model: Any, attention: nn.Module) -> tuple[int, int]:
    """Of an attention's keys and values, of all their heads together."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parts = dict(attention.named_children())
    found = [next((parts[name] for name in names if name in parts), None) for names in (KEYS, VALUES)]
    keys, values = (heads * size if part is None else out_features(part) for part in found)
    return keys, values


class PrefixTuning(OwnAdapter):
    """``adapter.type: prefix``: without the network that the paper makes the prefixes by while it trains, which PEFT
    leaves out as well unless it is asked for (``prefix_projection``): what it trains has no use afterwards, and is
    dozens of times as large.
    """

    name = "prefix"
    width_key = "prompt_tokens"

    def place(
        self, base: Any, r: int, generator: torch.Generator, chosen: Callable[[str], bool] = lambda _: True
    ) -> None:
        """See :class:`~.own_type.OwnAdapter`; in the chosen attentions alone, by their names."""
        configs: dict[int, Any] = {}
        found: dict[str, Any] = attentions(base)
        for _, attention in sorted((name, part) for name, part in found.items() if chosen(name)):
            device = next(attention.parameters()).device
            attention.add_module(SLOT, Prefix(r, widths(base, attention), generator).to(device))
            if id(attention.config) not in configs:  # masks are made by the model's own, which stays as it is
                configs[id(attention.config)] = copy.deepcopy(attention.config)
                configs[id(attention.config)]._attn_implementation = NAMES[_kind_of(attention)]
            attention.config = configs[id(attention.config)]

    def put(self, base: Any, placement: Placement) -> None:
        """See :class:`~.own_type.OwnAdapter`; not where the logits do not depend on one of an attention's layers: what
        would never train is no part of the adapter.
        """
        idle = {name.rpartition(".")[0] for name in placement.unreached}
        self.place(base, placement.adapter.prompt_tokens, placement.generator, lambda name: name not in idle)

    def put_saved(self, base: Any, description: Mapping[str, Any]) -> None:
        """See :class:`~.own_type.OwnAdapter`; where the file has prefixes."""
        own = {name.removeprefix(PREFIX).split(f".{SLOT}.")[0] for name in description["shapes"]}
        self.place(base, description["r"], torch.Generator(), own.__contains__)

    def chosen(self, model: nn.Module, unreached: Collection[str]) -> set[str]:
        """All prefixes that there are."""
        return {name for name, _ in model.named_parameters() if f".{SLOT}." in name}

    def check(self, model: Any) -> None:
        """See :func:`attentions`.

        Raises:
            UserError: or the kind of attention has no masks that could be longer, or no function to be called.
        """
        for name, attention in attentions(model).items():
            if _kind_of(attention) == "eager" and (
                _own_eager(attention) is None or getattr(attention, "reorder_and_upcast_attn", False)
            ):
                raise UserError(
                    f"model.attention='eager': adapter.type='prefix' cannot put keys before those of {name}, which "
                    f"{type(attention).__name__} then takes in a way of its own; set it to sdpa"
                )

    def width(self, base: nn.Module) -> int:
        """Keys of a prefix."""
        found = next(part for part in base.modules() if isinstance(part, Prefix))
        return int(whole_shape(found.keys)[0])


def _own_eager(attention: Any) -> Any:
    """The function of eager attention that a model's own file has; None where it has none."""
    return getattr(sys.modules.get(type(attention).__module__), "eager_attention_forward", None)


def _kind_of(attention: Any) -> str:
    kind = str(attention.config._attn_implementation)
    if kind not in NAMES:
        raise UserError(
            f"model.attention={kind!r}: adapter.type='prefix' puts keys before those of the text, for which this "
            f"kernel has no mask; set it to sdpa or eager"
        )
    return kind
