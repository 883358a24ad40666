"""A trained adapter at lower ranks, each an adapter of its own, with what it loses on the held-out set."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import Config
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.model.adapters.adapter_files import DIAGONALS
from tsqlora_scale.model.export_formats import check_out, written_folder
from tsqlora_scale.model.model_card import NAME
from tsqlora_scale.model.padded_adapter import copy_adapter
from tsqlora_scale.model.weight_files import (
    DESCRIPTION,
    PREFIX,
    WEIGHTS,
    check_adapter,
    layer_scalings,
    read_json,
)
from tsqlora_scale.ranks.truncate import CutBy, LayerFactors, truncate
from tsqlora_scale.run.adapted_model import load_adapted
from tsqlora_scale.run.build import started
from tsqlora_scale.run.preflight import Described
from tsqlora_scale.tasks.evaluation import evaluate_all

#: The table, beside the adapters' folders.
TABLE = "truncations.json"


def check_ranks(adapter: Path, ranks: Sequence[int]) -> None:
    """See that an adapter can be cut to these ranks, by its files alone.

    Raises:
        UserError: naming the rank, or what of the adapter cannot be cut.
    """
    described = check_adapter(adapter)
    largest = max(len(layer.a) for layer in _layers(adapter).values())
    if not ranks or min(ranks) < 1:
        raise UserError(f"--ranks {','.join(map(str, ranks))}: give ranks of 1 or more, as 8,16,32")
    if above := next((rank for rank in ranks if rank > largest), None):
        raise UserError(f"--ranks {above}: the adapter's largest rank is {largest}; a cut goes down alone")
    if described.get("use_dora"):
        raise UserError("--ranks: DoRA's magnitudes belong to the direction that a cut changes; cut plain LoRA")
    if embedding := next((name for name in load_file(adapter / WEIGHTS) if ".lora_embedding_" in name), None):
        raise UserError(f"--ranks: {embedding} adapts an embedding, which is not cut")


def with_loss(config: Config) -> Config:
    """The config with the loss among its metrics."""
    metrics = list(dict.fromkeys([*config.task.metrics, "loss"]))
    return config.model_copy(update={"task": config.task.model_copy(update={"metrics": metrics})})


def write_truncations(
    adapter: Path, out: Path, ranks: Sequence[int], *, by: CutBy, checked: Described | None, overwrite: bool = False
) -> list[dict[str, Any]]:
    """Write ``rank-N/`` of every rank, and :data:`TABLE`, whole or not at all. On one process.

    Args:
        ranks: that :func:`check_ranks` has let through.
        checked: of the adapter's run, to measure each on its held-out set; none: nothing is measured.

    Returns:
        A row of the adapter as it is, and one of every rank: ``rank``, ``parameters`` of the factors, ``error`` and
        ``metrics``.

    Raises:
        UserError: ``out`` is there already or cannot be written.
    """
    check_out(out, adapter, overwrite=overwrite)
    layers = _layers(adapter)
    with written_folder(out) as partial:
        rows: list[dict[str, Any]] = [{"rank": None, "parameters": _size(layers), "error": 0.0}]
        for rank in ranks:
            cut = truncate(layers, rank, by=by)
            _write(adapter, partial / f"rank-{rank}", cut.layers, error=cut.error)
            own = {name: len(layer.a) for name, layer in cut.layers.items()}
            rows.append({"rank": rank, "parameters": _size(cut.layers), "error": cut.error, "ranks": own})
        if checked is not None:
            folders = {rank: partial / f"rank-{rank}" for rank in ranks}
            measured = _measure(checked, adapter, folders)
            rows = [row | {"metrics": measured[row["rank"]]} for row in rows]
        (partial / TABLE).write_text(json.dumps({"by": by, "rows": rows}, indent=1), encoding="utf-8")
    return rows


def _layers(adapter: Path) -> dict[str, LayerFactors]:
    """The layers of a saved adapter that have a rank."""
    tensors = {name: value.float() for name, value in load_file(adapter / WEIGHTS).items()}

    def factor(layer: str, side: str) -> Tensor:
        return tensors[f"{PREFIX}{layer}.lora_{side}.weight"]

    scalings = layer_scalings(adapter)
    return {name: LayerFactors(factor(name, "A"), factor(name, "B"), scaling) for name, scaling in scalings.items()}


def _size(layers: Mapping[str, LayerFactors]) -> int:
    return sum(layer.a.numel() + layer.b.numel() for layer in layers.values())


def _write(adapter: Path, out: Path, layers: Mapping[str, LayerFactors], *, error: float) -> None:
    """An adapter's folder with other factors, every layer's scaling as it was. RsLoRA's follows the rank, and B makes
    up for it, so that the cut is an adapter of the same alpha."""
    out.mkdir()
    copy_adapter(adapter, out)
    (out / DIAGONALS).unlink(missing_ok=True)  # of other ranks
    tensors = load_file(adapter / WEIGHTS)
    described = read_json(adapter / DESCRIPTION)
    ranks, alphas = {name: len(layer.a) for name, layer in layers.items()}, {}
    for name, layer in layers.items():
        before, b = len(tensors[f"{PREFIX}{name}.lora_A.weight"]), layer.b
        alphas[name] = layer.scaling * ranks[name]
        if described.get("use_rslora"):
            alphas[name], b = layer.scaling * math.sqrt(before), b * math.sqrt(ranks[name] / before)
        for side, factor in (("A", layer.a), ("B", b)):
            key = f"{PREFIX}{name}.lora_{side}.weight"
            tensors[key] = factor.to(tensors[key].dtype).contiguous()
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    first = next(iter(ranks))
    described |= {"r": ranks[first], "lora_alpha": alphas[first]}
    is_uniform = len(set(ranks.values())) == len(set(alphas.values())) == 1
    described |= {"rank_pattern": {} if is_uniform else ranks, "alpha_pattern": {} if is_uniform else alphas}
    (out / DESCRIPTION).write_text(json.dumps(described, indent=2, sort_keys=True), encoding="utf-8")
    if (out / NAME).is_file():
        with (out / NAME).open("a", encoding="utf-8") as card:
            card.write(
                f"\nThis copy was cut to lower ranks after training: it lacks {error:.2%} of the update's norm.\n"
            )


def _measure(checked: Described, adapter: Path, folders: Mapping[int, Path]) -> dict[int | None, dict[str, float]]:
    """Metrics on the held-out set, of the adapter (None) and of every cut, on one base."""
    accelerator = started(checked.config, accumulation=1, trains=False)
    world = World.current(accelerator.device)
    model = load_adapted(checked, adapter, device=accelerator.device)

    def metrics() -> dict[str, float]:
        batch_size = checked.config.train.eval_batch_size
        return evaluate_all(model.eval(), checked.task, world, batch_size=batch_size)

    found: dict[int | None, dict[str, float]] = {None: metrics()}
    for rank, folder in folders.items():
        name = f"cut-{rank}"
        model.load_adapter(str(folder), adapter_name=name)
        model.set_adapter(name)
        found[rank] = metrics()
        model.set_adapter("default")
        model.delete_adapter(name)
    return found
