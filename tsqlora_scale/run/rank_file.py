"""Ranks that were found elsewhere, or by an earlier run: ``allocation.policy: file``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import Config
from tsqlora_scale.model.adapters.lora import lora_layers, short_name
from tsqlora_scale.model.base_model import skeleton
from tsqlora_scale.model.linear_layers import linear_layers, resolve_targets, weight_shape
from tsqlora_scale.model.weight_files import DESCRIPTION, pattern_of
from tsqlora_scale.ranks import start_with_ranks
from tsqlora_scale.tasks import auto_class_of

ADVICE = "give a run folder, an adapter's, or a yaml or json file of layers' names and ranks"


def check_rank_file(config: Config, model_config: Any, *, unreached: Collection[str] = ()) -> None:
    """``allocation.file`` against the config and its model, before weights are loaded.

    Args:
        unreached: layers of the model that are not adapted, as the logits do not depend on them.

    Raises:
        UserError: no ranks there, a name that fits no adapted layer, a rank above a layer's smaller dimension, or no
            rank at all.
    """
    bare = skeleton(auto_class_of(config.task), model_config, trust_remote_code=config.model.trust_remote_code)
    layers = linear_layers(bare)
    adapter = config.adapter
    names = resolve_targets(bare, adapter.target_modules, unreached=unreached, layers=adapter.layers)
    ranks = ranks_by_file(config, names)
    key = f"allocation.file={config.allocation.file!r}"
    for name, rank in ranks.items():
        widest = min(weight_shape(layers[name]))
        if rank > widest:
            raise UserError(f"{key}: {name} has rank {rank}, and no matrix of it can have more than {widest}; lower it")
    without = [name for name, rank in ranks.items() if not rank]
    if without and adapter.type == "dora":
        raise UserError(
            f"{key}: gives {without[0]} rank 0, and adapter.type='dora' trains a magnitude beside the ranks of every "
            "layer; leave such layers out of adapter.target_modules, or use adapter.type=lora"
        )
    if not any(ranks.values()):
        raise UserError(f"{key}: leaves every layer without a rank; give one to some")


def ranks_by_file(config: Config, names: Collection[str]) -> dict[str, int]:
    """The ranks of the layers ``names`` by ``allocation.file``; of those that it does not name, its default or
    ``adapter.r``.

    Raises:
        UserError: see :func:`check_rank_file`.
    """
    assert config.allocation.file is not None
    key = f"allocation.file={config.allocation.file!r}"
    pattern, otherwise = read_rank_file(Path(config.allocation.file), key=key)
    found, used = {}, set()
    for name in names:
        matching = pattern_of(name, pattern, where=key)
        used |= {matching}
        found[name] = (config.adapter.r if otherwise is None else otherwise) if matching is None else pattern[matching]
    for idle in sorted(pattern.keys() - used):  # of no use where an earlier name has its layers, and no mistake then
        if all(pattern_of(name, [idle], where=key) is None for name in names):
            raise UserError(
                f"{key}: {idle!r} is no layer that is adapted; set adapter.target_modules to the layers that it names, "
                "or remove it"
            )
    return found


def read_rank_file(path: Path, *, key: str) -> tuple[dict[str, int], int | None]:
    """Ranks by name, or end of a name, or pattern, as PEFT's ``rank_pattern`` has them; and the rank of all others.

    Raises:
        UserError: naming the file, the name and the value.
    """
    if path.is_dir():
        # a run's own word first: where factors start in the base, the adapter's file has more than the run's ranks
        above = [path.parent / "result.json"] if path.name == "adapter" else []
        places = [path / "result.json", *above, path / DESCRIPTION, path / "adapter" / DESCRIPTION]
        path = next((place for place in places if place.is_file()), path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))  # of which JSON is a part
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{key}: cannot be read ({' '.join(str(error).split())}); {ADVICE}") from None
    otherwise = None
    if isinstance(tree, Mapping) and tree.get("peft_type") is not None:
        removed = tree.get("exclude_modules") or []
        gone = dict.fromkeys([removed] if isinstance(removed, str) else removed, 0)
        tree, otherwise = {**gone, **(tree.get("rank_pattern") or {})}, tree.get("r")
    elif isinstance(tree, Mapping):
        kept = tree.get("kept")  # of a run, the ranks of what its adapter/ holds, which may be an earlier step's
        kept = kept.get("ranks") if isinstance(kept, Mapping) else None
        tree = kept or next((tree[name] for name in ("ranks_end", "rank_pattern") if name in tree), tree)
    if not isinstance(tree, Mapping) or (not tree and otherwise is None):
        raise UserError(f"{key}: holds no ranks; {ADVICE}")
    for name, rank in [*tree.items(), *([] if otherwise is None else [("r", otherwise)])]:
        if not isinstance(name, str) or not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise UserError(f"{key}: {name!r} has {rank!r}, which is no rank; ranks are whole numbers from 0 on")
    return dict(tree), otherwise


def start_by_file(model: nn.Module, config: Config) -> None:
    """Give a model with a fresh adapter the ranks of ``allocation.file``, its factors fresh, too."""
    names = {short_name(name): name for name in lora_layers(model)}
    ranks = ranks_by_file(config, names)
    start_with_ranks(model, {names[name]: rank for name, rank in ranks.items()}, seed=config.run.seed)
