"""Ranks in PEFT's layers: read them, set them, and carry a plan out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tsqlora_scale.adapters import ADAPTER, lora_layers
from tsqlora_scale.config import ResizeConfig
from tsqlora_scale.engine.state import TrainState
from tsqlora_scale.errors import UserError
from tsqlora_scale.ranks.policies import Plan
from tsqlora_scale.ranks.resize import layer_generator, resize_layer


def factor_names(layer: str) -> tuple[str, str]:
    """Parameter names of A and B of a layer, as ``model.named_parameters()`` has them."""
    return f"{layer}.lora_A.{ADAPTER}.weight", f"{layer}.lora_B.{ADAPTER}.weight"


def current_ranks(model: nn.Module) -> dict[str, int]:
    """The rank of every adapted layer, sorted by name. Right for sharded factors, too, whose shapes are empty."""
    return {name: layer.r[ADAPTER] for name, layer in lora_layers(model).items()}


def layer_dims(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of every adapted layer, sorted by name."""
    return {name: _dims(layer) for name, layer in lora_layers(model).items()}


def resize_model(
    model: nn.Module, state: TrainState, plan: Plan, *, cfg: ResizeConfig, seed: int, step: int
) -> tuple[TrainState, dict[str, float]]:
    """Carry ``plan`` out, between two engines: new factors in the layers whose rank changes.

    ``scaling`` stays as it is, so that kept components keep their effect. Factors of other layers, and parameters
    that are no factors, are left alone and passed on.

    Args:
        model: the bare model, not wrapped by an engine; its factors' contents may be sharded away.
        state: all trainable parameters, whole, with their moments. Not changed.
        plan: ranks of all adapted layers.
        cfg: how to grow and shrink.
        seed: of the run.
        step: optimizer steps finished; with the seed and the layer's name it fixes all randomness.

    Returns:
        The new state, and the shrink error of every layer whose rank fell.
    """
    layers = lora_layers(model)
    assert plan.ranks.keys() == layers.keys(), plan.ranks.keys() ^ layers.keys()
    params = dict(state.params)
    errors: dict[str, float] = {}
    for name, layer in layers.items():
        rank, before = plan.ranks[name], layer.r[ADAPTER]
        if rank == before:
            continue
        name_a, name_b = factor_names(name)
        resized = resize_layer(
            params[name_a],
            params[name_b],
            rank,
            shrink=cfg.shrink,
            grow_init=cfg.grow_init,
            generator=layer_generator(seed, step, name),
        )
        params[name_a], params[name_b] = resized.a, resized.b
        if rank < before:
            errors[name] = resized.shrink_error
        _install(layer, resized.a.value, resized.b.value)
    return TrainState(params, state.optimizer_steps), errors


def set_ranks(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Give the factors the shapes of ``ranks``, to load a checkpoint into. Changed factors are zero until then.

    Raises:
        UserError: when ``ranks`` names other layers than the model adapts.
    """
    layers = lora_layers(model)
    differing = sorted(ranks.keys() ^ layers.keys())
    if differing:
        raise UserError(
            f"the checkpoint and the model adapt different layers ({len(differing)}, the first is {differing[0]!r}); "
            "resume with the checkpoint's own model.name_or_path and adapter.target_modules"
        )
    for name, layer in layers.items():
        rank = ranks[name]
        if rank != layer.r[ADAPTER]:
            d_in, d_out = _dims(layer)
            _install(layer, torch.zeros(rank, d_in), torch.zeros(d_out, rank))


def _dims(layer: LoraLayer) -> tuple[int, int]:
    d_in, d_out = layer.in_features, layer.out_features
    assert d_in, "only linear layers are adapted"
    assert d_out
    return d_in, d_out


def _install(layer: LoraLayer, a: Tensor, b: Tensor) -> None:
    """Replace both factors of a PEFT layer by new linear layers, like the old ones in all but rank."""
    for factors, value in ((layer.lora_A, a), (layer.lora_B, b)):
        old = factors[ADAPTER]
        weight = old.weight
        # skip_init: nn.Linear would draw weights from the global generator
        linear = nn.utils.skip_init(
            nn.Linear, value.shape[1], value.shape[0], bias=False, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            linear.weight.copy_(value)
        linear.weight.requires_grad_(weight.requires_grad)
        linear.train(old.training)
        factors[ADAPTER] = linear
    layer.r[ADAPTER] = a.shape[0]
