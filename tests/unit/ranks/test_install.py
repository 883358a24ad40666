from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.ranks.models import adapted, padded_batch
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import ResizeConfig
from tsqlora_scale.engine.train_state import ParamState, TrainState
from tsqlora_scale.model.adapters.lora import lora_layers
from tsqlora_scale.ranks.install import current_ranks, layer_dims, resize_model, set_ranks, usual_second_moments
from tsqlora_scale.ranks.policies.policy import Plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def train_state(model) -> TrainState:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return TrainState({n: ParamState.fresh(p.detach().clone()) for n, p in trained.items()}, optimizer_steps=7)


def plan_of(ranks: dict[str, int]) -> Plan:
    return Plan(ranks=ranks, phi=1.0, budget=sum(ranks.values()), sensitivity={}, reasons={})


def logits(model, kind: str) -> torch.Tensor:
    batch = padded_batch(kind)
    with torch.no_grad():
        return model.eval()(**batch.inputs).logits


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("init", ["orthogonal", "gaussian"])
def test_growth_leaves_logits_unchanged(kind: str, init: str, folder: Path) -> None:
    model = adapted(kind, folder)
    before = logits(model, kind)
    ranks = {name: 3 + i % 4 for i, name in enumerate(current_ranks(model))}
    _, errors = resize_model(
        model, train_state(model), plan_of(ranks), cfg=ResizeConfig(grow_init=init), seed=0, step=5
    )
    assert errors == {}
    assert current_ranks(model) == ranks
    assert torch.allclose(logits(model, kind), before, atol=1e-6, rtol=0)


def test_shrink_changes_logits_by_what_the_error_says(folder: Path) -> None:
    model = adapted("bert", folder)
    before = logits(model, "bert")
    scaling = {n: layer.scaling["default"] for n, layer in lora_layers(model).items()}
    old = train_state(model)
    ranks = dict.fromkeys(current_ranks(model), 2)
    state, errors = resize_model(model, old, plan_of(ranks), cfg=ResizeConfig(), seed=0, step=5)
    assert errors.keys() == ranks.keys()
    for name, layer in lora_layers(model).items():
        names = [f"{name}.lora_{side}.default.weight" for side in "AB"]
        (a, b), (a_old, b_old) = ([s.params[n].value for n in names] for s in (state, old))
        assert errors[name] == pytest.approx(float((b @ a - b_old @ a_old).norm() / (b_old @ a_old).norm()), abs=1e-5)
        assert layer.scaling["default"] == scaling[name]
    assert not torch.allclose(logits(model, "bert"), before, atol=1e-6)


def test_installed_layers_are_what_the_state_says_and_train_on(folder: Path) -> None:
    model = adapted("bert", folder)
    old = train_state(model)
    untouched = {n: p.value.clone() for n, p in old.params.items()}
    modules = {n: layer.lora_A["default"] for n, layer in lora_layers(model).items()}
    ranks = {name: (5, 1, 3)[i % 3] for i, name in enumerate(modules)}
    rng = torch.get_rng_state()
    state, _ = resize_model(model, old, plan_of(ranks), cfg=ResizeConfig(), seed=0, step=5)
    assert torch.equal(rng, torch.get_rng_state())
    assert state.optimizer_steps == 7
    assert all(torch.equal(old.params[n].value, value) for n, value in untouched.items())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == state.params.keys()
    for name, param in trained.items():
        assert torch.equal(param, state.params[name].value)
        assert state.params[name].exp_avg.shape == state.params[name].exp_avg_sq.shape == param.shape
    for name, layer in lora_layers(model).items():
        assert layer.r["default"] == layer.lora_A["default"].weight.shape[0] == ranks[name]
        assert (layer.lora_A["default"] is modules[name]) == (ranks[name] == 3)
    padded_batch("bert").loss(model.train()).backward()
    assert all(p.grad is not None for p in trained.values())


def test_the_same_event_gives_the_same_factors(folder: Path) -> None:
    results = []
    for _ in range(2):
        model = adapted("bert", folder)
        ranks = {name: (5, 1)[i % 2] for i, name in enumerate(current_ranks(model))}
        results.append(resize_model(model, train_state(model), plan_of(ranks), cfg=ResizeConfig(), seed=1, step=5)[0])
    first, second = (result.params for result in results)
    assert all(torch.equal(first[n].value, second[n].value) for n in first)


def test_factors_keep_their_dtype_and_mode(folder: Path) -> None:
    model = adapted("bert", folder).eval()
    for layer in lora_layers(model).values():
        layer.lora_A["default"].to(torch.bfloat16).requires_grad_(False)
    state = train_state(adapted("bert", folder))
    resize_model(model, state, plan_of(dict.fromkeys(current_ranks(model), 4)), cfg=ResizeConfig(), seed=0, step=0)
    for layer in lora_layers(model).values():
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        assert (a.weight.dtype, a.weight.requires_grad, a.training) == (torch.bfloat16, False, False)
        assert (b.weight.dtype, b.weight.requires_grad) == (torch.float32, True)
        assert a.in_features == a.weight.shape[1]


def test_set_ranks_shapes_a_model_for_a_checkpoint(folder: Path) -> None:
    source, target = adapted("bert", folder), adapted("bert", folder)
    ranks = {name: 1 + i % 5 for i, name in enumerate(current_ranks(source))}
    resize_model(source, train_state(source), plan_of(ranks), cfg=ResizeConfig(), seed=0, step=1)
    set_ranks(target, current_ranks(source))
    target.load_state_dict(source.state_dict())
    assert current_ranks(target) == ranks
    assert torch.equal(logits(target, "bert"), logits(source, "bert"))


def test_set_ranks_refuses_other_layers(folder: Path) -> None:
    model = adapted("bert", folder)
    ranks = current_ranks(model)
    name = next(iter(ranks))
    with pytest.raises(UserError, match=f"{name}.*target_modules"):
        set_ranks(model, {n: r for n, r in ranks.items() if n != name})


def test_dimensions_are_those_of_the_base_layers(folder: Path) -> None:
    model = adapted("t5", folder)
    dims = layer_dims(model)
    assert list(dims) == list(current_ranks(model))
    for name, layer in lora_layers(model).items():
        assert dims[name] == tuple(reversed(layer.get_base_layer().weight.shape))


def without_every_third(model) -> dict[str, int]:
    return {name: (0, 3, 4)[i % 3] for i, name in enumerate(current_ranks(model))}


def test_a_layer_of_rank_0_is_the_base_layer_and_leaves_no_parameter(folder: Path) -> None:
    model, reference = adapted("bert", folder), adapted("bert", folder)
    before, dims = train_state(model), layer_dims(model)
    ranks = without_every_third(model)
    removed = [name for name, rank in ranks.items() if not rank]
    state, errors = resize_model(model, before, plan_of(ranks), cfg=ResizeConfig(), seed=0, step=5)
    assert [errors[name] for name in removed] == [1.0] * len(removed)
    assert current_ranks(model) == ranks
    assert layer_dims(model) == dims
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == state.params.keys()
    assert len(trained) == len(before.params) - 2 * len(removed)
    assert all(p.numel() for p in model.parameters())
    for name in removed:  # B = 0 is what a removed adapter does
        nn.init.zeros_(lora_layers(reference)[name].lora_B["default"].weight)
    assert torch.allclose(logits(model, "bert"), logits(reference, "bert"), atol=1e-6, rtol=0)
    padded_batch("bert").loss(model.train()).backward()
    assert all(p.grad is not None for p in trained.values())


@pytest.mark.parametrize("init", ["orthogonal", "gaussian"])
def test_a_layer_comes_back_from_nothing(init: str, folder: Path) -> None:
    model = adapted("bert", folder)
    original, scaling = current_ranks(model), {n: m.scaling["default"] for n, m in lora_layers(model).items()}
    ranks = {name: 0 if i % 3 == 0 else 3 for i, name in enumerate(original)}
    state, _ = resize_model(model, train_state(model), plan_of(ranks), cfg=ResizeConfig(), seed=0, step=5)
    generator = torch.Generator().manual_seed(0)
    for entry in state.params.values():
        entry.exp_avg_sq = torch.rand(entry.value.shape, generator=generator)
    without = logits(model, "bert")
    state, errors = resize_model(model, state, plan_of(original), cfg=ResizeConfig(grow_init=init), seed=0, step=9)
    assert errors == {}
    assert torch.allclose(logits(model, "bert"), without, atol=1e-6, rtol=0)
    assert current_ranks(model) == original
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == state.params.keys()
    for name, layer in lora_layers(model).items():
        assert layer.scaling["default"] == scaling[name]
        if not ranks[name]:
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            assert (a.weight.dtype, b.weight.dtype) == (torch.float32, torch.float32)
            assert a.weight.requires_grad and b.weight.requires_grad
            assert not b.weight.any()
    padded_batch("bert").loss(model.train()).backward()
    assert all(p.grad is not None for p in trained.values())


def test_second_moments_of_a_layer_that_comes_back_are_those_of_its_kind() -> None:
    def entry(value: float, *shape: int) -> ParamState:
        return ParamState(torch.zeros(shape), torch.zeros(shape), torch.full(shape, value))

    layers = ["0.query", "0.value", "1.query", "1.value", "2.query", "2.only"]
    params = {}
    for layer, size in (("0.query", 1.0), ("1.query", 4.0), ("0.value", 100.0)):
        params[f"{layer}.lora_A.default.weight"] = entry(size, 2, 6)
        params[f"{layer}.lora_B.default.weight"] = entry(10 * size, 5, 2)
    state = TrainState(params, optimizer_steps=3)
    assert usual_second_moments(state, layers, "2.query") == (2.5, 25.0)
    assert usual_second_moments(state, layers, "1.value") == (100.0, 1000.0)
    assert usual_second_moments(state, layers, "2.only") == (35.0, 350.0)


def test_set_ranks_removes_and_brings_back(folder: Path) -> None:
    source, target = adapted("bert", folder), adapted("bert", folder)
    ranks = without_every_third(source)
    resize_model(source, train_state(source), plan_of(ranks), cfg=ResizeConfig(), seed=0, step=1)
    set_ranks(target, ranks)
    target.load_state_dict(source.state_dict())
    assert torch.equal(logits(target, "bert"), logits(source, "bert"))
    set_ranks(target, dict.fromkeys(ranks, 3))
    assert set(current_ranks(target).values()) == {3}
    assert {n for n, p in target.named_parameters() if p.requires_grad} == {
        n for n, p in adapted("bert", folder).named_parameters() if p.requires_grad
    }
