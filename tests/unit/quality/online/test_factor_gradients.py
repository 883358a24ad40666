"""What a step's own backward pass says of its samples, against a scoring pass and against plain autograd."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.quality.toys import RandomPool, lora_model
from tsqlora_scale.model.adapters.lora import theta_modules
from tsqlora_scale.quality import PerSampleGradients, Sketch
from tsqlora_scale.quality.online.factor_gradients import FactorGradients

DIM = 64


def heard(model: nn.Module, pool: RandomPool, rows: np.ndarray, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms and sketches of one backward pass of the summed losses; the parameters' gradients stay."""
    gradients = FactorGradients(lambda m: theta_modules(m, **options), sketch_dim=DIM, seed=3)
    gradients.attach(model)
    gradients.start(len(rows))
    pool.losses(model, pool.batch(rows)).sum().backward()
    found = gradients.stop()
    gradients.detach()
    assert found is not None
    return found


def passed(model: nn.Module, pool: RandomPool, rows: np.ndarray, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by a scoring pass."""
    with PerSampleGradients(model, theta_modules(model, **options)) as gradients:
        _, of_theta = gradients.per_sample(pool.losses, pool.batch(rows))
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in of_theta.values()]).norm(dim=0)
    return norms, Sketch(DIM, seed=3)(of_theta)


@pytest.mark.parametrize("kind", ["bert", "mpnet", "bart", "t5", "llama", "gpt2"])
def test_as_in_a_pass_and_the_step_is_the_same(kind: str, models_dir: Path) -> None:
    pool, rows = RandomPool(kind, 6), np.arange(6)
    model = lora_model(kind, models_dir).eval()
    pool.losses(model, pool.batch(rows)).sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    norms, sketches = heard(model, pool, rows)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
    model.zero_grad()
    expected = passed(model, pool, rows)
    torch.testing.assert_close(norms, expected[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(sketches, expected[1], rtol=1e-5, atol=1e-5 * float(norms.max()))


def test_the_head_too(models_dir: Path) -> None:
    pool, rows = RandomPool("bert", 4), np.arange(4)
    model = lora_model("bert", models_dir).eval()
    for found, expected in zip(
        heard(model, pool, rows, include_head=True), passed(model, pool, rows, include_head=True), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not any("forward" in vars(part) for part in model.modules() if type(part) is nn.Linear)


def test_checkpointed_activations(models_dir: Path) -> None:
    """A layer's forward pass runs twice, its backward pass once."""
    pool, rows = RandomPool("bert", 4), np.arange(4)
    model = lora_model("bert", models_dir)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    plain = heard(model, pool, rows)
    model.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    for found, expected in zip(heard(model, pool, rows), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_masks_of_dropout_are_those_of_the_step(models_dir: Path) -> None:
    """With the same masks the parts of the samples add up to the step's gradient; listening draws no number."""
    pool, rows = RandomPool("bert", 4), np.arange(4)
    model = lora_model("bert", models_dir)
    torch.manual_seed(5)
    pool.losses(model, pool.batch(rows)).sum().backward()
    state = torch.get_rng_state()
    weights = {f"{name}.weight": part.weight.grad for name, part in theta_modules(model).items()}
    wanted = Sketch(DIM, seed=3)({name: g.unsqueeze(0) for name, g in weights.items() if g is not None})[0]
    model.zero_grad()
    torch.manual_seed(5)
    _, sketches = heard(model, pool, rows)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(sketches.sum(0), wanted, rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """A layer called twice, once more without effect, and once without the batch's dimension."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, *, shared: bool = False) -> torch.Tensor:
        self.linear(x)
        out = self.linear(torch.tanh(self.linear(x)))
        return (out + self.linear(torch.ones(1, 2, 6)) if shared else out).square().sum((1, 2))


def test_calls_of_one_module_are_added_up_before_the_norm() -> None:
    model, x = Twice(), torch.randn(3, 2, 6)
    gradients = FactorGradients(lambda m: {"linear": m.linear}, sketch_dim=16, seed=0)
    gradients.attach(model)
    gradients.start(3)
    model(x).sum().backward()
    found = gradients.stop()
    assert found is not None
    gradients.detach()
    for i in range(3):
        alone = torch.autograd.grad(model(x[i : i + 1]).sum(), list(model.parameters()))
        assert found[0][i].item() == pytest.approx(torch.cat([g.flatten() for g in alone]).norm().item(), rel=1e-5)


def test_calls_without_the_batchs_dimension_are_left_out_and_named() -> None:
    model, x = Twice(), torch.randn(3, 2, 6)
    gradients = FactorGradients(lambda m: {"linear": m.linear}, sketch_dim=16, seed=0)
    gradients.attach(model)
    gradients.start(3)
    model(x, shared=True).sum().backward()
    assert gradients.shared == "linear"
    found, step = gradients.stop(), [p.grad.clone() for p in model.parameters()]
    assert found is not None
    gradients.detach()
    assert all(bool(norm > 0) for norm in found[0])
    model.zero_grad()
    model(x, shared=True).sum().backward()
    for mine, parameter in zip(step, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)


def test_under_autocast_as_torch_does_it(models_dir: Path) -> None:
    pool, rows = RandomPool("bert", 4), np.arange(4)
    model = lora_model("bert", models_dir).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = pool.losses(model, pool.batch(rows))
        wanted.float().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    listener = FactorGradients(theta_modules, sketch_dim=DIM, seed=0)
    listener.attach(model)
    listener.start(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = pool.losses(model, pool.batch(rows))
        losses.float().sum().backward()
    assert listener.stop() is not None
    assert torch.equal(losses, wanted)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            scale = float(gradients[name].abs().max()) + 1e-6
            torch.testing.assert_close(parameter.grad / scale, gradients[name] / scale, rtol=0.05, atol=0.05)


class TimeFirst(nn.Module):
    """A layer that sees (T, B, d), and one that sees all tokens in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = torch.tanh(self.first(x.transpose(0, 1))).transpose(0, 1)
        flat = self.second(turned.reshape(-1, 6)).view_as(turned)
        return flat.square().sum((1, 2))


def test_of_one_sample_all_of_every_call_is_its_own() -> None:
    model, x = TimeFirst(), torch.randn(1, 4, 6)
    names = {"base.first.lora_A.default": model.first, "second": model.second}
    gradients = FactorGradients(lambda _: names, sketch_dim=16, seed=0, without_batch=frozenset({"base.first"}))
    gradients.attach(model)
    gradients.start(1)
    model(x).sum().backward()
    found = gradients.stop()
    assert found is not None
    assert gradients.shared is None
    gradients.detach()
    alone = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert found[0].tolist() == [pytest.approx(torch.cat([g.flatten() for g in alone]).norm().item(), rel=1e-5)]
