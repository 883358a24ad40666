"""LoRA, and what its variants share with it: PEFT's own layers, of ranks that may differ and change."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.engine.sharded import read_parameter
from tsqlora_scale.model.adapters.adapter_files import describe_adapter, write_adapter
from tsqlora_scale.model.adapters.placement import Placement
from tsqlora_scale.model.adapters.weight_start import start_in_weights, start_values
from tsqlora_scale.model.base_model import use_autocast
from tsqlora_scale.model.heads import has_head, head_modules
from tsqlora_scale.model.linear_layers import is_idle, linear_layers, resolve_targets
from tsqlora_scale.model.weight_files import (
    ADVICE,
    DESCRIPTION,
    PREFIX,
    WEIGHTS,
    check_adapter,
    layer_scalings,
    read_json,
)

#: PEFT's name of the one adapter that a run trains.
ADAPTER = "default"


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers of ``model`` by module name, sorted: the order of every collective and every plan.

    A layer of rank ``r[ADAPTER]`` has ``lora_A[ADAPTER].weight`` of shape (r, d_in), ``lora_B[ADAPTER].weight`` of
    shape (d_out, r), ``scaling[ADAPTER]`` and ``get_base_layer()``. One of rank 0 has neither factor, because ZeRO-1
    and 2 fail on parameters without elements; PEFT's forward passes over what is not in ``lora_A``.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and ADAPTER in m.r}
    return dict(sorted(found.items()))


def has_factors(layer: LoraLayer) -> bool:
    """Whether the layer's rank is not 0."""
    return ADAPTER in layer.lora_A


def short_name(layer: str) -> str:
    """A layer's name without PEFT's wrapping, as ``rank_pattern`` and people write it."""
    return layer.removeprefix("base_model.model.")


def scaling_at(layer: LoraLayer, rank: int) -> float:
    """What a layer multiplies B A by once it has a rank, not 0: rsLoRA's follows the rank, any other stays."""
    if layer.use_rslora.get(ADAPTER):
        return float(layer.lora_alpha[ADAPTER]) / math.sqrt(rank)
    return float(layer.scaling[ADAPTER])


def theta_modules(module: nn.Module, *, include_head: bool = False) -> dict[str, nn.Linear]:
    """The linear modules whose parameters make theta, by name, sorted.

    The two factors of every adapted layer and, with ``include_head``, the linear modules inside PEFT's
    ``modules_to_save`` copies (weights and biases).
    """
    found: dict[str, nn.Module] = {}
    for name, layer in lora_layers(module).items():
        if has_factors(layer):
            found[f"{name}.lora_A.{ADAPTER}"] = layer.lora_A[ADAPTER]
            found[f"{name}.lora_B.{ADAPTER}"] = layer.lora_B[ADAPTER]
    if include_head:
        for name, wrapper in module.named_modules():
            if isinstance(wrapper, ModulesToSaveWrapper) and ADAPTER in wrapper.modules_to_save:
                for inner, part in wrapper.modules_to_save[ADAPTER].named_modules():
                    if isinstance(part, nn.Linear):
                        found[".".join(filter(None, (name, "modules_to_save", ADAPTER, inner)))] = part
    assert found, "no adapted layer to take gradients of"
    linear = {name: part for name, part in sorted(found.items()) if isinstance(part, nn.Linear)}
    assert linear.keys() == found.keys(), f"not linear: {sorted(found.keys() - linear.keys())}"
    return linear


def with_ranks(model: PeftModel, *, base_name: str, revision: str | None) -> LoraConfig:
    """PEFT's config of a trained model, with the ranks and the scalings as they are.

    ``rank_pattern`` and ``alpha_pattern`` give every layer its rank and keep its scaling exactly; layers of rank 0 are
    named in ``exclude_modules``.

    Args:
        base_name: what it names as the base.
        revision: of the base, likewise.
    """
    config: Any = copy.copy(model.peft_config[ADAPTER])
    layers = lora_layers(model)
    ranks = {short_name(n): layer.r[ADAPTER] for n, layer in layers.items()}
    if any(rank != config.r for rank in ranks.values()):
        config.rank_pattern = {name: rank for name, rank in ranks.items() if rank}
        scalings = {short_name(n): layer.scaling[ADAPTER] for n, layer in layers.items()}
        divisors = {name: math.sqrt(rank) if config.use_rslora else rank for name, rank in config.rank_pattern.items()}
        config.alpha_pattern = {name: scalings[name] * divisor for name, divisor in divisors.items()}
        config.exclude_modules = [name for name, rank in ranks.items() if not rank] or None
    config.base_model_name_or_path, config.revision = base_name, revision
    config.target_modules = sorted(config.target_modules)  # PEFT keeps a set: another order in every process
    return config  # type: ignore[no-any-return]


def with_start(
    description: dict[str, Any], layers: Mapping[str, LoraLayer], start: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """An adapter's description for the base as it was: every layer has the factors of its start, too. RsLoRA's scaling
    follows that rank, and B makes up for it.

    Args:
        start: these factors by name (:func:`.start_values`).
    """
    config, keys, joins = dict(description["config"]), dict(description["keys"]), {}
    ranks, alphas = {}, {}
    for name, layer in layers.items():
        short = short_name(name)
        ranks[short] = layer.r[ADAPTER] + len(start[f"{name}.start_A"])
        times = {}
        alphas[short] = layer.scaling[ADAPTER] * ranks[short]
        if config["use_rslora"]:
            alphas[short] = layer.scaling[ADAPTER] * math.sqrt(layer.r[ADAPTER])
            times = {"B": {"times": math.sqrt(ranks[short] / layer.r[ADAPTER])}}
        for side in "AB":
            trained = f"{name}.lora_{side}.{ADAPTER}.weight"
            key = keys.pop(trained, f"{name}.lora_{side}.weight")
            own = trained if has_factors(layer) else None
            joins[key] = {"trained": own, "start": f"{name}.start_{side}", "side": side, **times.get(side, {})}
    config |= {"rank_pattern": ranks, "alpha_pattern": alphas, "exclude_modules": None}
    return {"config": config, "keys": keys, "joined": joins}


def lora_config_of(folder: Path) -> LoraConfig:
    """PEFT's config of a saved adapter with LoRA factors, whatever else it has."""
    described = read_json(folder / DESCRIPTION)
    for own in ("filter_rank", "filtered_blocks"):  # LoRATRF's, which PEFT would warn of
        described.pop(own, None)
    return LoraConfig.from_peft_type(**{**described, "peft_type": "LORA"})  # type: ignore[no-any-return]


def check_magnitudes(folder: Path, kind: str) -> None:
    """Check that a saved LoRA adapter that is to go on has DoRA's magnitudes where its type trains them, and there
    alone.

    Args:
        kind: ``adapter.type``.

    Raises:
        UserError: they would be left behind, or are missing.
    """
    has_magnitudes = bool(read_json(folder / DESCRIPTION).get("use_dora"))
    if has_magnitudes and kind != "dora":
        raise UserError(
            f"adapter {str(folder)!r}: is of adapter.type='dora', and adapter.type={kind!r} would leave its magnitudes "
            "behind; give the config that it was trained with, or a base that it is merged into (export --format "
            "merged)"
        )
    if kind == "dora" and not has_magnitudes:
        raise UserError(f"adapter {str(folder)!r}: has no magnitudes, which adapter.type='dora' trains; {ADVICE}")


def _whole_modules(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """PEFT's copies of modules that are saved whole, by the module's name in the base."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and ADAPTER in module.modules_to_save
    }


class LoraAdapter:
    """``adapter.type: lora``. See :class:`~tsqlora_scale.model.adapters.adapter_type.AdapterType`."""

    name = "lora"
    #: More of :class:`peft.LoraConfig`'s arguments.
    peft_options: Mapping[str, Any] = {}
    #: Whether PEFT itself can write what the type is saved as.
    peft_writes = True

    def build(self, base: nn.Module, placement: Placement) -> PeftModel:
        """Put LoRA layers on ``base``; A is drawn in name order, B is zero.

        Factors and newly initialised heads train in float32; with a 16-bit base the forward runs under autocast, the
        same on every engine.
        """
        adapter = placement.adapter
        targets = resolve_targets(base, adapter.target_modules, unreached=placement.unreached, layers=adapter.layers)
        layers = linear_layers(base)
        trained = [module for module in placement.new_modules if not is_idle(module, layers, placement.unreached)]
        config = LoraConfig(
            r=adapter.r,
            lora_alpha=adapter.alpha,  # type: ignore[arg-type]
            lora_dropout=adapter.dropout,
            target_modules=targets,
            modules_to_save=trained or None,
            task_type=placement.task_type,  # type: ignore[arg-type]
            **self.peft_options,
        )
        kept = head_modules(base) if has_head(placement.task_type) and not adapter.train_head else []
        model = get_peft_model(base, config)
        for name, wrapper in _whole_modules(model).items():
            if name in kept:
                wrapper.modules_to_save.requires_grad_(False)
        for layer in lora_layers(model).values():
            weight: nn.Parameter = layer.lora_A[ADAPTER].weight  # type: ignore[assignment]
            drawn = torch.empty(weight.shape)
            if adapter.init == "gaussian":
                weight.data.copy_(drawn.normal_(0, 1 / adapter.r, generator=placement.generator))
            else:
                weight.data.copy_(drawn.uniform_(-1, 1, generator=placement.generator) / weight.shape[1] ** 0.5)
        if adapter.starts_in_base:
            start_in_weights(lora_layers(model), ADAPTER, adapter.init)
        for module in model.modules():
            for name, param in list(module.named_parameters(recurse=False)):
                if param.requires_grad:
                    module.register_parameter(name, nn.Parameter(read_parameter(param).float()))
        use_autocast(model, placement.dtype)
        return model

    def untrained(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """What the adapter's file holds beside trained parameters: a head that stays as it is, and what factors started
        from. With ZeRO-3 a collective.
        """
        return {
            f"{PREFIX}{name}.modules_to_save.{ADAPTER}.{inner}": read_parameter(param)
            for name, wrapper in _whole_modules(model).items()
            for inner, param in wrapper.modules_to_save[ADAPTER].named_parameters()
            if not param.requires_grad
        } | start_values(lora_layers(model))

    def heads(self, model: nn.Module) -> set[str]:
        """See :class:`~.adapter_type.AdapterType`."""
        return {name for name, param in model.named_parameters() if param.requires_grad and ".lora_" not in name}

    def theta(self, module: nn.Module, *, include_head: bool = False) -> dict[str, nn.Linear]:
        """See :func:`theta_modules`."""
        return theta_modules(module, include_head=include_head)

    def save(
        self,
        model: nn.Module,
        values: Mapping[str, torch.Tensor],
        folder: Path,
        *,
        base_name: str,
        revision: str | None = None,
    ) -> None:
        """Write a plain PEFT adapter: ``PeftModel.from_pretrained`` opens it, nothing of ours needed.

        Args:
            model: the trained PEFT model; its parameters may be sharded.
            values: full trainable parameters by name, and those of :meth:`untrained`.
            folder: written by the caller's process alone.
            base_name: what ``adapter_config.json`` names as the base.
            revision: of the base, likewise.
        """
        assert isinstance(model, PeftModel)
        if not self.peft_writes or start_values(lora_layers(model)):
            write_adapter(folder, self.describe(model, values, base_name=base_name, revision=revision), values)
            return
        trained: Any = model.peft_config[ADAPTER]
        config = with_ranks(model, base_name=base_name, revision=revision)
        state = {name: value.contiguous() for name, value in values.items()}
        empty = [n for n, v in state.items() if v.numel() == 0]
        assert not empty, f"sharded parameters reached the adapter file: {empty}"
        model.peft_config[ADAPTER] = config
        try:
            model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
        finally:
            model.peft_config[ADAPTER] = trained

    def describe(
        self, model: nn.Module, values: Mapping[str, torch.Tensor], *, base_name: str, revision: str | None = None
    ) -> dict[str, Any]:
        """What :func:`.write_adapter` needs beside ``values`` to write what :meth:`save` writes, later, by itself."""
        assert isinstance(model, PeftModel)
        layers = lora_layers(model)
        start = start_values(layers)
        trained = {name: value for name, value in values.items() if name not in start}
        found = describe_adapter(model, trained, with_ranks(model, base_name=base_name, revision=revision))
        return with_start(found, layers, start) if start else found

    def load(self, base: nn.Module, folder: Path, *, dtype: str) -> PeftModel:
        """Put a saved adapter on a fresh base, for evaluation.

        Raises:
            UserError: when the folder holds no adapter, or one in an unsafe format.
        """
        check_adapter(folder)
        model = PeftModel.from_pretrained(base, str(folder))
        use_autocast(model, dtype)
        return model

    def read(
        self, model: nn.Module, folder: Path, *, whole: bool = True
    ) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
        """A saved adapter's ranks by layer and values by parameter name, for a model with a fresh one of the config.

        Args:
            whole: whether what is trained beside the layers, a head, must be there, too.

        Raises:
            UserError: when the folder holds no adapter, or one of other layers, magnitudes or another scaling.
        """
        check_adapter(folder)
        check_magnitudes(folder, self.name)
        tensors, heads = self._tensors(folder), self.heads(model)
        config: Any = lora_config_of(folder)
        removed = set(config.exclude_modules or [])
        absent = {f"{name}.lora_{side}.{ADAPTER}.weight" for name in lora_layers(model) for side in "ABE"
                  if short_name(name) in removed}  # fmt: skip
        values = {}
        for name, param in model.named_parameters():
            if param.requires_grad and name not in absent:
                key = name.replace(f".modules_to_save.{ADAPTER}.", ".").replace(f".{ADAPTER}.", ".")
                key = key.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
                if key not in tensors and not whole and name in heads:
                    continue
                if key not in tensors:
                    raise UserError(f"adapter {str(folder)!r} has no {key}; give the config that it was trained with")
                values[name] = tensors[key].float()
        ranks = {name: len(values.get(f"{name}.lora_A.{ADAPTER}.weight", ())) for name in lora_layers(model)}
        scalings = layer_scalings(folder)
        for name, layer in lora_layers(model).items():
            if not ranks[name]:
                continue
            scaling = scalings[short_name(name).replace(f".modules_to_save.{ADAPTER}", "")]
            wanted = scaling_at(layer, ranks[name])
            if abs(scaling - wanted) > 1e-6 * wanted:
                raise UserError(
                    f"adapter {str(folder)!r} scales {short_name(name)} by {scaling:g}, adapter.alpha and "
                    f"adapter.r of the config say {wanted:g}; give the config that it was trained with"
                )
        return ranks, values

    def _tensors(self, folder: Path) -> dict[str, torch.Tensor]:
        """What a saved adapter holds, by the keys that its parameters have there."""
        return load_file(folder / WEIGHTS)
