"""Ranks in PEFT's layers: read them, set them, and carry a plan out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.random_streams import layer_generator
from tsqlora_scale.config.schema import ResizeConfig
from tsqlora_scale.engine.sharded import write_parameter
from tsqlora_scale.engine.train_state import ParamState, TrainState
from tsqlora_scale.model.adapters.lora import ADAPTER, has_factors, lora_layers
from tsqlora_scale.ranks.policies.policy import Plan
from tsqlora_scale.ranks.resize import component_importance, resize_layer


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
    model: nn.Module,
    state: TrainState,
    plan: Plan,
    *,
    cfg: ResizeConfig,
    seed: int,
    step: int,
    sketches: Mapping[str, Tensor] | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """Carry ``plan`` out, between two engines: new factors in the layers whose rank changes.

    ``scaling`` stays as it is, so that kept components keep their effect. Factors of other layers, and parameters
    that are no factors, are left alone and passed on. A layer whose rank becomes 0 loses its factors, modules,
    parameters and moments alike; one that comes back starts with B = 0 (see :func:`usual_second_moments`).

    Args:
        model: the bare model, not wrapped by an engine; its factors' contents may be sharded away.
        state: all trainable parameters, whole, with their moments. Not changed.
        plan: ranks of all adapted layers.
        cfg: how to grow and shrink.
        seed: of the run.
        step: optimizer steps finished; with the seed and the layer's name it fixes all randomness.
        sketches: of the weights' gradients by layer, (k, d_in), for ``grow_init: gradient``.

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
        d_in, d_out = _dims(layer)
        name_a, name_b = factor_names(name)
        resized = resize_layer(
            params.pop(name_a, ParamState.fresh(torch.zeros(0, d_in))),
            params.pop(name_b, ParamState.fresh(torch.zeros(d_out, 0))),
            rank,
            shrink=cfg.shrink,
            grow_init=cfg.grow_init,
            generator=layer_generator(seed, step, name),
            sketch=(sketches or {}).get(name),
            usual_sq=(0.0, 0.0) if before else usual_second_moments(state, layers, name),
        )
        if rank:
            params[name_a], params[name_b] = resized.a, resized.b
        if rank < before:
            errors[name] = resized.shrink_error
        _install(layer, resized.a.value, resized.b.value)
    return TrainState(params, state.optimizer_steps), errors


def usual_second_moments(state: TrainState, layers: Iterable[str], name: str) -> tuple[float, float]:
    """Mean second moments of A's and of B's elements, for a layer that has none of its own.

    Over layers of the same kind, those whose names end alike (the queries of all blocks), as gradients of different
    kinds differ most; over all layers where none of that kind has a rank. One number a factor: coordinates of
    different layers have nothing to do with each other.
    """
    present = [other for other in layers if factor_names(other)[0] in state.params]
    kind = [other for other in present if other.rpartition(".")[2] == name.rpartition(".")[2]]
    means = [
        torch.cat([state.params[factor_names(other)[side]].exp_avg_sq.double().flatten() for other in kind or present])
        for side in (0, 1)
    ]
    return float(means[0].mean()), float(means[1].mean())


def components(state: TrainState, layers: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """The importance of every component of ``layers``, r numbers each; see :func:`~.resize.component_importance`."""
    found: dict[str, tuple[float, ...]] = {}
    for name in layers:
        factors = [state.params[n] for n in factor_names(name) if n in state.params]
        found[name] = tuple(component_importance(*factors).tolist()) if factors else ()
    return found


def layer_factors(model: nn.Module, state: TrainState) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A (r, d_in), B (d_out, r) and the scaling of every adapted layer, sorted by name; r is 0 where it has none."""
    found = {}
    for name, layer in lora_layers(model).items():
        d_in, d_out = _dims(layer)
        none = (torch.zeros(0, d_in), torch.zeros(d_out, 0))
        a, b = (
            state.params[each].value if each in state.params else absent
            for each, absent in zip(factor_names(name), none, strict=True)
        )
        found[name] = a, b, float(layer.scaling[ADAPTER])
    return found


def start_with_ranks(model: nn.Module, ranks: Mapping[str, int], *, seed: int) -> None:
    """Give a model with a fresh adapter other ranks, its factors fresh, too: A drawn by layer, B zero. Scalings stay.

    Raises:
        UserError: when ``ranks`` names other layers than the model adapts.
    """
    before = current_ranks(model)
    set_ranks(model, ranks)
    for name, layer in lora_layers(model).items():
        if ranks[name] and ranks[name] != before[name]:
            d_in, _ = _dims(layer)
            drawn = torch.empty(ranks[name], d_in).uniform_(-1, 1, generator=layer_generator(seed, 0, name))
            write_parameter(layer.lora_A[ADAPTER].weight, drawn / d_in**0.5)  # type: ignore[arg-type]


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
    """Replace both factors of a PEFT layer by new linear layers, like the old ones in all but rank.

    No factors stay in a layer of rank 0. Those of one that comes back are as the adapter made them: trained, float32,
    on the base layer's device.
    """
    layer.r[ADAPTER] = a.shape[0]
    present = has_factors(layer)
    for factors, value in ((layer.lora_A, a), (layer.lora_B, b)):
        old = factors.pop(ADAPTER) if present else None
        if not layer.r[ADAPTER]:
            continue
        base: Tensor = layer.get_base_layer().weight  # type: ignore[assignment]
        device, dtype = (base.device, torch.float32) if old is None else (old.weight.device, old.weight.dtype)
        # skip_init: nn.Linear would draw weights from the global generator
        linear = nn.utils.skip_init(nn.Linear, value.shape[1], value.shape[0], bias=False, device=device, dtype=dtype)
        with torch.no_grad():
            linear.weight.copy_(value)
        linear.weight.requires_grad_(True if old is None else old.weight.requires_grad)
        linear.train(layer.get_base_layer().training if old is None else old.training)
        factors[ADAPTER] = linear
