"""Batched per-sample gradients against autograd, one sample at a time."""

from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.reference.quality import score_one_by_one
from tests.unit.quality.toys import KINDS, Batch, RandomPool, lora_model
from tsqlora_scale.model.adapters.lora import lora_layers, theta_modules
from tsqlora_scale.quality.gradients.batch_memory import bytes_kept
from tsqlora_scale.quality.gradients.per_sample import FP16_LOSS_SCALE, PerSampleGradients, _loss_scale
from tsqlora_scale.quality.gradients.sketch import Sketch
from tsqlora_scale.ranks import current_ranks, set_ranks

ALL = np.arange(5)


def reference(model, pool, **options):
    return score_one_by_one(model, pool.singles(), lambda m, b: pool.losses(m, b)[0], eta=0.1, **options)


def assert_same_gradients(found, expected, rtol=1e-4):
    assert sorted(found) == sorted(expected.shapes), "every factor has a gradient"
    for name, gradient in found.items():
        wanted = expected.of(name)
        scale = np.abs(wanted).max(axis=tuple(range(1, wanted.ndim)), keepdims=True)
        assert (scale > 0).all(), f"{name}: nothing to compare"
        assert np.abs(gradient.numpy() - wanted).max() <= rtol * scale.max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_batched_gradients_equal_autograd(kind, tiny_folder):
    model, pool = lora_model(kind, tiny_folder), RandomPool(kind, 5)
    with PerSampleGradients(model, theta_modules(model)) as gradients:
        losses, found = gradients.per_sample(pool.losses, pool.batch(ALL))
    expected = reference(model, pool)
    assert gradients.batchless is None
    np.testing.assert_allclose(losses, expected.loss, rtol=1e-5)
    assert_same_gradients(found, expected)


def assert_folds_equal(gradients, losses, batch):
    """Norms and sketches of gradients that are not kept, against those of gradients that are."""
    sketch = Sketch(64, seed=0)
    values, found = gradients.per_sample(losses, batch)
    kept = gradients.held
    norm = torch.stack([g.double().flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0)
    for wanted in (sketch, None):
        again, norms, sketches = gradients.folded(losses, batch, sketch=wanted)
        assert torch.equal(values, again)
        np.testing.assert_allclose(norms, norm, rtol=1e-6)
        if wanted is None:
            assert sketches.shape == (batch.size, 0)
        else:
            expected = wanted(found)
            scale = np.abs(expected.numpy()).max(1, keepdims=True)
            np.testing.assert_allclose(sketches / scale, expected / scale, atol=2e-6)
    return kept, gradients.held


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_sketches_need_no_gradient_that_stays(kind, checkpointed, tiny_folder):
    model, pool = lora_model(kind, tiny_folder, r=16), RandomPool(kind, 5)  # longer than the shortest texts
    if checkpointed and kind != "mpnet":  # which has none
        model.config.use_cache = False
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with PerSampleGradients(model, theta_modules(model, include_head=kind in ("mpnet", "bert"))) as gradients:
        for size in (5, 1):
            kept, held = assert_folds_equal(gradients, pool.losses, pool.batch(ALL[:size]))
            assert held < kept / (2 if kind == "deberta" else 3), "DeBERTa's query and key are called twice"


@pytest.mark.parametrize("layers", [2, 6])
def test_memory_of_folding_does_not_grow_with_theta(layers, tiny_folder):
    """At any depth a factor at a time is there."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(layers)))
    theta = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    batch = Batch({"x": torch.randn(3, 4, 8)}, torch.zeros(3))
    with PerSampleGradients(model, theta) as gradients:
        kept, held = assert_folds_equal(gradients, lambda m, b: m(b.inputs["x"]).sum((1, 2)), batch)
    assert kept == layers * 3 * (64 + 8) * 4
    assert held <= 2 * 3 * (64 + 8) * 4


def test_losses_alone_are_those_of_the_backward_pass(tiny_folder):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 5)
    with PerSampleGradients(model, theta_modules(model)) as gradients:
        expected, _ = gradients.per_sample(pool.losses, pool.batch(ALL))
        found = gradients.losses_alone(pool.losses, pool.batch(ALL))
    assert not found.requires_grad
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("removed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["bert", "deberta", "bart"])
def test_layers_of_rank_0_have_no_gradient_and_change_no_other(kind, removed, tiny_folder):
    """The first layers among them, and one or the other of DeBERTa's query and key, which see the positions."""
    model, pool = lora_model(kind, tiny_folder), RandomPool(kind, 5)
    set_ranks(model, {name: 3 * (i % 3 != removed) for i, name in enumerate(current_ranks(model))})
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        for factors in (layer.lora_A, layer.lora_B):
            for linear in factors.values():
                nn.init.normal_(linear.weight, std=0.1)
    expected = reference(model, pool)
    with PerSampleGradients(model, theta_modules(model)) as gradients:
        losses, found = gradients.per_sample(pool.losses, pool.batch(ALL))
        assert gradients.batchless is None
        with gradients.stepped(found, 0.1):
            after = pool.losses(model, pool.batch(ALL))
    assert_same_gradients(found, expected)
    np.testing.assert_allclose(losses - after, expected.delta_loss, rtol=1e-4, atol=2e-6 * expected.loss.max())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mpnet"])  # which has no checkpointing
def test_gradient_checkpointing_changes_nothing(kind, tiny_folder, monkeypatch):
    """Not the gradients, to the bit, and not the losses after a step; and it takes place."""
    model, pool = lora_model(kind, tiny_folder), RandomPool(kind, 5)
    model.config.use_cache = False  # as a loaded base has it
    for part in model.modules():  # the models have none, and evaluation mode must leave it out, everywhere
        if isinstance(part, nn.Dropout):
            part.p = 0.5
        for name in ("dropout", "activation_dropout", "attention_dropout", "layerdrop"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.5)

    def found():
        with PerSampleGradients(model, theta_modules(model)) as gradients:
            losses, of_theta = gradients.per_sample(pool.losses, pool.batch(ALL))
            with gradients.stepped(of_theta, 0.1):
                after = pool.losses(model, pool.batch(ALL))
        return {**of_theta, "losses": losses, "after": after}

    plain = found()
    counts = {"calls": 0, "forwards": 0, "kept": []}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [part for part in model.modules() if getattr(part, "gradient_checkpointing", False) is True]
    layers = [part for part in layers if isinstance(part, GradientCheckpointingLayer)]
    original = layers[0]._gradient_checkpointing_func

    def counting(*args, **kwargs):
        counts["calls"] += 1
        return original(*args, **kwargs)

    for layer in layers:
        layer._gradient_checkpointing_func = counting
        name = next(iter(theta_modules(layer)))
        theta_modules(layer)[name].register_forward_hook(lambda *_: counts.update(forwards=counts["forwards"] + 1))
    checkpointed = found()
    assert counts["calls"] == len(layers) >= 2, "once a layer; not by the forward pass without a graph"
    assert counts["forwards"] >= 3 * len(layers), "before the step, again in its backward pass, and after it"
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        assert torch.equal(value, checkpointed[name]), name
    assert all(layer._gradient_checkpointing_func is counting and layer.training for layer in layers)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_checkpointed_activations_are_not_kept(kind, tiny_folder):
    """Nor the adapters' inputs: of every layer its own input is left, and one layer is recomputed at a time."""
    model, pool = lora_model(kind, tiny_folder), RandomPool(kind, 5)
    kept = {}
    for how in ("plain", "checkpointed"):
        if how == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with PerSampleGradients(model, theta_modules(model)) as gradients:
            gradients.recomputed = 0
            work = partial(gradients.per_sample, pool.losses, pool.batch(ALL))
            kept[how] = (bytes_kept(model, work), gradients.recomputed)
    assert kept["plain"][1] == 0
    assert kept["checkpointed"][0] < kept["plain"][0] / 4
    assert 0 < kept["checkpointed"][1] < kept["plain"][0]


@pytest.mark.parametrize("kind", ["mpnet", "bert", "deberta"])
def test_head_is_included_on_demand(kind, tiny_folder):
    model, pool = lora_model(kind, tiny_folder), RandomPool(kind, 5)
    expected = reference(model, pool, include_head=True)
    assert any("modules_to_save" in name and name.endswith("bias") for name in expected.shapes)
    with PerSampleGradients(model, theta_modules(model, include_head=True)) as gradients:
        assert_same_gradients(gradients.per_sample(pool.losses, pool.batch(ALL))[1], expected)


def test_positions_without_the_batch_get_it(tiny_folder):
    model, pool = lora_model("deberta", tiny_folder), RandomPool("deberta", 5)
    positions = []
    query = model.base_model.model.deberta.encoder.layer[0].attention.self.query_proj
    handle = query.register_forward_hook(lambda _, args, output: positions.append((args[0].shape[0], len(output))))
    with PerSampleGradients(model, theta_modules(model)) as gradients:
        gradients.per_sample(pool.losses, pool.batch(ALL))
        assert gradients.batchless is None
        gradients.per_sample(pool.losses, pool.batch(ALL[:1]))
    handle.remove()
    assert positions == [(5, 5), (1, 5), (1, 1), (1, 1)], "text and positions; of five samples, then of one"


class Table(nn.Module):
    """Projects a table without a batch dimension, (entries, width), and looks samples up in it."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.table = nn.Parameter(torch.randn(7, 6, generator=torch.Generator().manual_seed(0)), requires_grad=False)

    def forward(self, ids):
        return self.proj(self.table)[ids].sum((1, 2)) ** 2


def test_a_batchless_call_of_another_kind_is_recognised():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Table(), LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False))
    batch = Batch({"ids": torch.arange(6).reshape(3, 2)}, torch.zeros(3))
    with PerSampleGradients(model, theta_modules(model)) as gradients:
        gradients.per_sample(lambda m, b: m(**b.inputs), batch)
    assert "proj" in gradients.batchless


@pytest.mark.parametrize("kind", ["bert", "deberta", "t5"])
def test_each_sample_sees_its_own_step(kind, tiny_folder):
    model, pool = lora_model(kind, tiny_folder), RandomPool(kind, 5)
    before = copy.deepcopy(model.state_dict())
    batch = pool.batch(ALL)
    with PerSampleGradients(model, theta_modules(model, include_head=kind != "t5")) as gradients:
        losses, found = gradients.per_sample(pool.losses, batch)
        with gradients.stepped(found, 0.1):
            after = pool.losses(model, batch)
        again, _ = gradients.per_sample(pool.losses, batch)
    expected = reference(model, pool, include_head=kind != "t5")
    np.testing.assert_allclose(losses - after, expected.delta_loss, rtol=1e-4, atol=2e-6 * expected.loss.max())
    assert torch.equal(losses, again), "the shift ends with its context"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class TwoCalls(nn.Module):
    """One linear layer on two inputs of different lengths, the way a shared projection is used."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)

    def forward(self, x):
        self.unused(x)
        return self.proj(torch.tanh(self.proj(x))[:, :2]).sum((1, 2)) ** 2


def one_of_two(module, batch):
    """Of two calls of the module the loss depends on the first alone."""
    first = module.proj(batch.inputs["x"])
    module.proj(first)
    return first.sum((1, 2))


def test_calls_of_one_module_are_summed_and_unused_factors_left_out():
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(TwoCalls(), LoraConfig(r=2, target_modules=["proj", "unused"], init_lora_weights=False))
        x = torch.randn(4, 5, 6)
    batch = Batch({"x": x}, torch.zeros(4))
    with PerSampleGradients(model, theta_modules(model)) as gradients:
        _, found = gradients.per_sample(lambda m, b: m(**b.inputs), batch)
        assert_folds_equal(gradients, lambda m, b: m(**b.inputs), batch)
        assert gradients.held == 2 * sum(x.nbytes for x in found.values()) or gradients.held > 0
        assert_folds_equal(
            gradients, lambda m, b: m.proj(b.inputs["x"]).sum((1, 2)) + 0 * m(**b.inputs).detach(), batch
        )
    assert found
    assert not any("unused" in name for name in found)
    singles = [Batch({"x": x[i : i + 1]}, torch.zeros(1)) for i in range(4)]
    expected = score_one_by_one(model, singles, lambda m, b: m(b.inputs["x"].double())[0], eta=0.1)
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, expected.of(name), rtol=1e-4, atol=1e-5)


def snapshot(model):
    return (
        [(name, module.training) for name, module in model.named_modules()],
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        {name: parameter.grad for name, parameter in model.named_parameters()},
        sum(len(module._forward_hooks) for module in model.modules()),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_module_is_left_as_it_was(fails, tiny_folder):
    model, pool = lora_model("bert", tiny_folder), RandomPool("bert", 5)
    model.base_model.model.bert.pooler.eval()  # mixed modes come back as they were
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)

    def losses(module, batch):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        if fails:
            raise ArithmeticError
        return pool.losses(module, batch)

    if fails:
        with pytest.raises(ArithmeticError), PerSampleGradients(model, theta_modules(model)) as gradients:
            gradients.per_sample(losses, pool.batch(ALL))
    else:
        with torch.no_grad(), PerSampleGradients(model, theta_modules(model)) as gradients:
            gradients.per_sample(losses, pool.batch(ALL))
    after = snapshot(model)
    assert before[:2] == after[:2]
    assert before[3] == after[3]
    for name, gradient in after[2].items():
        assert gradient is before[2][name], name
        assert gradient is None or bool((gradient == 1).all()), name


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_bases(dtype, rtol, tiny_folder):
    pool = RandomPool("llama", 5)
    model = lora_model("llama", tiny_folder, dtype=dtype)
    tiny_loss = 1e-4  # of float16's smallest numbers: without a scale the gradients would vanish
    with PerSampleGradients(model, theta_modules(model)) as gradients:
        _, found = gradients.per_sample(lambda m, b: pool.losses(m, b).float() * tiny_loss, pool.batch(ALL))
        assert gradients.rounding == torch.finfo(dtype).eps
    expected = reference(model, pool)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0) / tiny_loss
    np.testing.assert_allclose(norms, expected.grad_norm, rtol=rtol)
    assert all(g.dtype == torch.float32 for g in found.values())


def test_four_bit_base(tiny_folder):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier", "pooler"],
    )  # fmt: skip
    model, pool = lora_model("bert", tiny_folder, quantization_config=quantization), RandomPool("bert", 5)
    batch = pool.batch(ALL)
    with PerSampleGradients(model, theta_modules(model)) as gradients:
        _, found = gradients.per_sample(pool.losses, batch)
    assert found.keys() == {f"{name}.weight" for name in theta_modules(model)}
    model.eval()
    for i, single in enumerate(pool.singles()):
        model.zero_grad()
        pool.losses(model, single)[0].backward()
        for name, parameter in model.named_parameters():
            if name in found:
                atol = 1e-4 * float(parameter.grad.abs().max())
                np.testing.assert_allclose(found[name][i], parameter.grad, rtol=1e-3, atol=atol, err_msg=name)


def test_engines_are_refused(tiny_folder):
    class DeepSpeedEngine(nn.Module):
        pass

    with pytest.raises(AssertionError, match="unwrapped"):
        PerSampleGradients(DeepSpeedEngine(), {})


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=5))
def test_the_scale_of_half_precision_keeps_squared_errors_gradients_finite(losses: list[float]) -> None:
    """Of (y - t)^2 the gradient is 2 |y - t|; that of a cross-entropy is below 1, and is scaled as far as it goes."""
    scale = _loss_scale(torch.tensor(losses))
    assert 2 * math.sqrt(max(losses)) * scale <= 65504 / 2
    assert math.log2(scale).is_integer()
    assert scale == FP16_LOSS_SCALE or max(losses) > 60


def test_the_scale_of_half_precision_looks_at_finite_losses() -> None:
    assert _loss_scale(torch.tensor([math.nan, 2.0])) == FP16_LOSS_SCALE
    assert _loss_scale(torch.tensor([math.inf])) == FP16_LOSS_SCALE
