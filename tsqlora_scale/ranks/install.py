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
from tsqlora_scale.model.adapters.lora import ADAPTER, has_factors, lora_layers, scaling_at
from tsqlora_scale.model.adapters.svd import INITIAL_STD, Diagonal, add_diagonal, diagonals_of
from tsqlora_scale.ranks.policies.policy import Plan
from tsqlora_scale.ranks.rearrange import Triplets, most_important, rearrange
from tsqlora_scale.ranks.resize import component_importance, resize_layer


def factor_names(layer: str) -> tuple[str, str]:
    """Parameter names of A and B of a layer, as ``model.named_parameters()`` has them."""
    return f"{layer}.lora_A.{ADAPTER}.weight", f"{layer}.lora_B.{ADAPTER}.weight"


def diagonal_name(layer: str) -> str:
    """Parameter name of E of a layer of triplets, likewise."""
    return f"{layer}.lora_E.{ADAPTER}.weight"


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
        The new state, and the shrink error of every layer that lost something.
    """
    layers = lora_layers(model)
    assert plan.ranks.keys() == layers.keys(), plan.ranks.keys() ^ layers.keys()
    params = dict(state.params)
    errors: dict[str, float] = {}
    for name in plan.changed({name: layer.r[ADAPTER] for name, layer in layers.items()}):
        layer, rank = layers[name], plan.ranks[name]
        before = layer.r[ADAPTER]
        old = _factors(params, name, layer)
        usual = usual_second_moments(state, layers, name) if not before else (0.0, 0.0, 0.0)
        sketch, generator = (sketches or {}).get(name), layer_generator(seed, step, name)
        if diagonals_of(layer) is not None or name in plan.keep:
            keep = plan.keep[name] if name in plan.keep else most_important(*old, rank)
            new, error = rearrange(
                *old, keep, rank, grow_init=cfg.grow_init, generator=generator, usual_sq=usual, sketch=sketch
            )
        else:
            resized = resize_layer(
                *old[:2],
                rank,
                shrink=cfg.shrink,
                grow_init=cfg.grow_init,
                generator=generator,
                sketch=sketch,
                usual_sq=(usual[0], usual[1]),
            )
            new, error = (resized.a, resized.b, None), resized.shrink_error
        names = factor_names(name)
        for part, entry in zip((*names, diagonal_name(name)), new, strict=True):
            params.pop(part, None)
            if rank and entry is not None:
                params[part] = entry
        if rank < before or not plan.keeps_all(name, {name: before}):
            errors[name] = error
        _install(layer, new[0].value, new[1].value, None if new[2] is None else new[2].value)
    return TrainState(params, state.optimizer_steps), errors


def _factors(params: Mapping[str, ParamState], name: str, layer: LoraLayer) -> Triplets:
    """A, B, and E where there is one, of a layer of any rank."""
    d_in, d_out = _dims(layer)
    name_a, name_b = factor_names(name)
    empty = {name_a: (0, d_in), name_b: (d_out, 0), diagonal_name(name): (0,)}
    a, b, e = (params[n] if n in params else ParamState.fresh(torch.zeros(shape)) for n, shape in empty.items())
    return a, b, e if diagonals_of(layer) is not None else None


def usual_second_moments(state: TrainState, layers: Iterable[str], name: str) -> tuple[float, ...]:
    """Mean second moments of the elements of A, of B and, of triplets, of E, for a layer that has none of its own.

    Over layers of the same kind, those whose names end alike (the queries of all blocks), as gradients of different
    kinds differ most; over all layers where none of that kind has a rank. One number a factor: coordinates of
    different layers have nothing to do with each other.
    """
    present = [other for other in layers if factor_names(other)[0] in state.params]
    kind = [other for other in present if other.rpartition(".")[2] == name.rpartition(".")[2]]
    parts = ((*factor_names(other), diagonal_name(other)) for other in kind or present)
    found = ([state.params[n] for n in side if n in state.params] for side in zip(*parts, strict=True))
    return tuple(float(torch.cat([e.exp_avg_sq.double().flatten() for e in side]).mean()) for side in found if side)


def components(state: TrainState, layers: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """The importance of every component of ``layers``, r numbers each; see :func:`~.resize.component_importance`."""
    found: dict[str, tuple[float, ...]] = {}
    for name in layers:
        factors = [state.params[n] for n in factor_names(name) if n in state.params]
        found[name] = tuple(component_importance(*factors).tolist()) if factors else ()
    return found


def layer_factors(model: nn.Module, state: TrainState) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A (r, d_in), B (d_out, r) and the scaling of every adapted layer, sorted by name; r is 0 where it has none.

    Of triplets B is B diag(E).
    """
    found = {}
    for name, layer in lora_layers(model).items():
        a, b, e = _factors(state.params, name, layer)
        found[name] = a.value, b.value if e is None else b.value * e.value, float(layer.scaling[ADAPTER])
    return found


def start_with_ranks(model: nn.Module, ranks: Mapping[str, int], *, seed: int) -> None:
    """Give a model with a fresh adapter other ranks, its factors fresh, too: A drawn by layer, B zero; of triplets both
    drawn, E zero. Scalings stay, but for rsLoRA's, which follow the ranks.

    Raises:
        UserError: when ``ranks`` names other layers than the model adapts.
    """
    before = current_ranks(model)
    set_ranks(model, ranks)
    for name, layer in lora_layers(model).items():
        if ranks[name] and ranks[name] != before[name]:
            (d_in, d_out), generator = _dims(layer), layer_generator(seed, 0, name)
            if diagonals_of(layer) is None:
                drawn = {"A": torch.empty(ranks[name], d_in).uniform_(-1, 1, generator=generator) / d_in**0.5}
            else:
                shapes = {"A": (ranks[name], d_in), "B": (d_out, ranks[name])}
                drawn = {
                    side: torch.empty(shape).normal_(0.0, INITIAL_STD, generator=generator)
                    for side, shape in shapes.items()
                }
            for side, value in drawn.items():
                write_parameter(getattr(layer, f"lora_{side}")[ADAPTER].weight, value)


def set_ranks(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Give the factors the shapes of ``ranks``, to load a checkpoint into. Changed factors are zero until then, and
    scaled as :func:`.scaling_at` says.

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
            e = torch.zeros(rank) if diagonals_of(layer) is not None else None
            _install(layer, torch.zeros(rank, d_in), torch.zeros(d_out, rank), e)
            if rank:
                layer.scaling[ADAPTER] = scaling_at(layer, rank)


def _dims(layer: LoraLayer) -> tuple[int, int]:
    d_in, d_out = layer.in_features, layer.out_features
    assert d_in, "only linear layers are adapted"
    assert d_out
    return d_in, d_out


def _install(layer: LoraLayer, a: Tensor, b: Tensor, e: Tensor | None) -> None:
    """Replace both factors of a PEFT layer by new linear layers, like the old ones in all but rank, and the diagonal.

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
    if e is not None:
        _install_diagonal(layer, e)


def _install_diagonal(layer: LoraLayer, e: Tensor) -> None:
    """Beside factors that are there already."""
    diagonals = diagonals_of(layer)
    if diagonals is not None and ADAPTER in diagonals:
        diagonals.pop(ADAPTER)
    if not layer.r[ADAPTER]:
        return
    factor = layer.lora_A[ADAPTER]
    diagonal = Diagonal(len(e), device=factor.weight.device)  # type: ignore[arg-type]
    with torch.no_grad():
        diagonal.weight.copy_(e)
    diagonal.weight.requires_grad_(factor.weight.requires_grad)  # type: ignore[arg-type]
    add_diagonal(layer, diagonal.train(factor.training))
