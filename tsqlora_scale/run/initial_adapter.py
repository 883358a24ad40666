"""A new run from a trained adapter: ``adapter.init_from``."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.locations import resolve
from tsqlora_scale.config.model_section import ADAPTER_TRAITS
from tsqlora_scale.config.schema import AdapterConfig, Config
from tsqlora_scale.engine.sharded import read_parameter, whole_shape, write_parameter
from tsqlora_scale.model.adapters.adapter_type import adapter_type, check_sizes, own_type
from tsqlora_scale.model.adapters.lora import ADAPTER
from tsqlora_scale.model.adapters.loratrf import blocks_of, check_filters, filtered_blocks
from tsqlora_scale.model.adapters.placed_model import in_whole_module
from tsqlora_scale.model.base_model import skeleton
from tsqlora_scale.model.block_depths import block_of, chosen_blocks
from tsqlora_scale.model.linear_layers import resolve_targets
from tsqlora_scale.model.weight_files import (
    DESCRIPTION,
    PREFIX,
    WEIGHTS,
    check_adapter,
    check_layers,
    kind_of,
    layer_ranks,
    layer_scalings,
    read_json,
    require_adapter,
)
from tsqlora_scale.ranks import set_ranks
from tsqlora_scale.ranks.policies.gain import most_ranks
from tsqlora_scale.run.trained_adapter import adapter_folder, config_of
from tsqlora_scale.tasks import auto_class_of


def check_initial(config: Config, model_config: Any, *, unreached: Collection[str] = ()) -> None:
    """``adapter.init_from`` against the config and its model, before weights are loaded.

    Args:
        unreached: layers of the model that are not adapted, as the logits do not depend on them.

    Raises:
        UserError: no adapter there, or one of another type, base, layers, shapes, scaling or range of ranks.
    """
    place = config.adapter.init_from
    if place is None:
        return
    key = f"adapter.init_from={place!r}"
    if not Path(place).is_dir():
        raise UserError(f"{key}: is no folder; give an adapter's folder, a run folder or a checkpoint")
    bare = skeleton(auto_class_of(config.task), model_config, trust_remote_code=config.model.trust_remote_code)
    with adapter_folder(place, option="adapter.init_from") as folder:
        try:
            require_adapter(folder)
            description = read_json(folder / DESCRIPTION)
            _check_kind(config, description, key)
            own = own_type(config.adapter.type)
            if own is not None:
                own.check_fits(folder, bare, heads=False)
                check_sizes(folder, config.adapter)
                _check_blocks(config.adapter, description, bare, key)
                _check_base(config, description, key)
                return
            check_adapter(folder)
            check_layers(folder, bare)
            if config.adapter.type == "loratrf":
                check_filters(folder, bare)
                check_sizes(folder, config.adapter)
                _check_filtered(config.adapter, folder, bare, unreached)
        except UserError as error:
            told = str(error).removeprefix(f"{key}: ").replace(str(folder), place)
            raise UserError(f"{key}: {told}") from None
        ranks, scalings = layer_ranks(folder), layer_scalings(folder)
    _check_base(config, description, key)
    layers = config.adapter.layers
    targets = set(resolve_targets(bare, config.adapter.target_modules, unreached=unreached, layers=layers))
    differing = sorted(targets ^ ranks.keys())
    if differing:
        which = "not adapted there" if differing[0] in targets else "adapted there, and not by adapter.target_modules"
        raise UserError(f"{key}: {differing[0]} is {which}; set adapter.target_modules to the same layers")
    _check_ranks(config, ranks, scalings, key)


def _check_kind(config: Config, description: dict[str, Any], key: str) -> None:
    kind = kind_of(description)
    own_kind = "lora" if ADAPTER_TRAITS[config.adapter.type].triplets else config.adapter.type  # as files have it
    if kind != own_kind:
        raise UserError(f"{key}: is a {kind} adapter, adapter.type is {config.adapter.type!r}; set it to {kind!r}")


def _check_filtered(adapter: AdapterConfig, folder: Path, bare: nn.Module, unreached: Collection[str]) -> None:
    """The blocks that saved filters stand behind against those of this run."""
    wanted = set(filtered_blocks(bare, unreached, adapter.layers))
    differing = sorted(wanted ^ set(blocks_of(folder, bare)))
    if differing:
        which = "no filter" if differing[0] in wanted else "a filter"
        raise UserError(f"has {which} behind {differing[0]}; set adapter.layers as there")


def _check_blocks(adapter: AdapterConfig, description: dict[str, Any], bare: nn.Module, key: str) -> None:
    """What a saved adapter of ours trains, heads aside, against the blocks that this run does."""
    if adapter.layers is None:
        return
    wanted, layers = chosen_blocks(bare, adapter.layers), f"adapter.layers={adapter.layers!r}"
    names = [name for name in description["parameters"] if not in_whole_module(name, description["whole_modules"])]
    more = next((name for name in names if block_of(name) not in wanted), None)
    if more is not None:
        raise UserError(f"{key}: has trained {more.removeprefix(PREFIX)}, too, which {layers} leaves out; remove it")
    missing = sorted(wanted - {block_of(name) for name in names})
    if missing:
        raise UserError(f"{key}: has not trained {missing[0]}, and {layers}; set it as there")


def _check_base(config: Config, description: dict[str, Any], key: str) -> None:
    base, own = str(description.get("base_model_name_or_path")), config.model.name_or_path
    if not same_base(base, own):
        raise UserError(
            f"{key}: was trained on {base!r}, model.name_or_path is {own!r}; set it to that, or, if it is the same "
            "model, mend base_model_name_or_path in the adapter's adapter_config.json"
        )


def _check_ranks(config: Config, ranks: dict[str, int], scalings: dict[str, float], key: str) -> None:
    adapter = config.adapter
    follows = adapter.type == "rslora"  # a layer's own rank
    for name, scaling in scalings.items():
        wanted = adapter.alpha / (math.sqrt(ranks[name]) if follows else adapter.r)
        if abs(scaling - wanted) > 1e-6 * wanted:
            raise UserError(
                f"{key}: {name} is scaled by {scaling:g}, adapter.alpha and {'its rank' if follows else 'adapter.r'} "
                f"make it {wanted:g}; set adapter.alpha={adapter.alpha * scaling / wanted:.9g}"
            )
    if config.adapts_ranks:
        lowest, highest = config.allocation.r_min, most_ranks(config.allocation, adapter.r)
        for name, rank in ranks.items():
            if not lowest <= rank <= highest:
                raise UserError(
                    f"{key}: {name} has rank {rank}, outside of allocation.r_min={lowest} to allocation.r_max="
                    f"{highest}; change them, or set allocation.policy=fixed"
                )


def same_base(written: str, own: str) -> bool:
    """Whether two names of a base mean the same one: the same name or folder, or a folder of that name elsewhere."""
    places = [Path(resolve(name, key="model.name_or_path") if name == own else name) for name in (written, own)]
    return written == own or places[0].resolve() == places[1].resolve() or places[0].name == places[1].name


def start_from(model: nn.Module, config: Config) -> list[str]:
    """Give a model with a fresh adapter the ranks and values of ``adapter.init_from``. With ZeRO-3 a collective.

    A head is taken over where its task is the same, and else stays as it was drawn.

    Returns:
        What to say of the head, line by line.
    """
    place = config.adapter.init_from
    assert place is not None
    lines = []
    with adapter_folder(place, option="adapter.init_from") as folder:
        ranks, values = adapter_type(config.adapter.type).read(model, folder, whole=False)
        if not config.adapter.train_head and _has_other_head(folder, model):
            lines.append(
                f"adapter.init_from={place!r}: its trained head is left behind, as adapter.train_head=false keeps that "
                f"of model.name_or_path={config.model.name_or_path!r}"
            )
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    heads = adapter_type(config.adapter.type).heads(model)
    reason = other_task(config, place)
    if reason is None:
        missing = [name for name in heads if name not in values or values[name].shape != whole_shape(params[name])]
        reason = "it has none of that shape" if missing else None
    set_ranks(model, ranks)
    params = dict(model.named_parameters())
    for name, value in sorted(values.items()):
        if name not in heads or reason is None:
            write_parameter(params[name], value)
    if heads and reason is not None:
        lines.append(f"adapter.init_from={place!r}: the head is newly drawn, as {reason}")
    return lines


def _has_other_head(folder: Path, model: nn.Module) -> bool:
    """Whether a saved adapter has other values than the model of a parameter that does not train there. Values, as a
    head that has never trained is saved, too. With ZeRO-3 a collective."""
    differs = False
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        present = set(file.keys())
        for name, param in model.named_parameters():
            key = name.replace(f".modules_to_save.{ADAPTER}.", ".")
            if param.requires_grad or key not in present:
                continue
            own, theirs = read_parameter(param).cpu(), file.get_tensor(key)
            coarser = min(own.dtype, theirs.dtype, key=lambda kind: kind.itemsize)
            differs |= not torch.equal(own.to(coarser), theirs.to(coarser))
    return differs


def other_task(config: Config, place: str) -> str | None:
    """Why the head of a run's adapter is of no use for the config's task; None where it is, or nothing speaks of it."""
    try:
        tree = yaml.safe_load(config_of(place).read_text(encoding="utf-8"))
        task = tree["task"]
        kind, labels = task["type"], task.get("labels")
    except (UserError, OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None
    if kind != config.task.type:
        return f"its task was {kind}"
    if labels != config.task.labels:
        return "its labels were others"
    return None
