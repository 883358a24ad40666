"""Policies that choose components, against slow references; what is dropped and appended; the penalty's gradient."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.reference.components import ada_kept, ela_exchange, smoothed
from tests.unit.config_trees import tree as config_tree
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.comparison.comparison_file import as_overrides
from tsqlora_scale.config.load import load_config, parse_config
from tsqlora_scale.config.schema import AllocationConfig, SensitivityConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.train_state import ParamState, TrainState
from tsqlora_scale.model.adapters.lora import ADAPTER
from tsqlora_scale.model.adapters.svd import Diagonal, add_diagonal
from tsqlora_scale.ranks.importance import ImportanceTracker
from tsqlora_scale.ranks.install import layer_factors, start_with_ranks
from tsqlora_scale.ranks.orthogonality import distance_gradient
from tsqlora_scale.ranks.policies.adalora import AdaLoraPolicy, cubic_budget, most_important_of_all
from tsqlora_scale.ranks.policies.elalora import ElaLoraPolicy, exchange
from tsqlora_scale.ranks.policies.policy import Plan, Statistics
from tsqlora_scale.ranks.rearrange import most_important, rearrange

#: Few different values, so that ties are common.
SCORES = st.dictionaries(
    st.sampled_from("abcdef"), st.lists(st.integers(0, 6).map(float), max_size=5).map(tuple), min_size=1
)


def statistics(components: dict[str, tuple[float, ...]], **changes: Any) -> Statistics:
    base = Statistics(
        sensitivity={},
        ranks={name: len(scores) for name, scores in components.items()},
        dims=dict.fromkeys(components, (64, 64)),
        initial_rank=3,
        quality=1.0,
        first_quality=1.0,
        components=components,
    )
    return dataclasses.replace(base, **changes)


@given(SCORES, st.integers(0, 20), st.integers(0, 2))
def test_the_best_of_all_components_stay(components: dict[str, tuple[float, ...]], budget: int, r_min: int) -> None:
    kept = most_important_of_all(components, budget, r_min=r_min)
    assert kept == ada_kept(components, budget, r_min)
    total, guaranteed = sum(map(len, components.values())), sum(min(len(s), r_min) for s in components.values())
    assert sum(map(len, kept.values())) == min(max(budget, guaranteed), total)


@given(SCORES, st.integers(0, 8), st.integers(1, 4), st.integers(0, 2), st.integers(2, 6))
def test_drops_and_gains_come_in_pairs(
    components: dict[str, tuple[float, ...]], count: int, candidates: int, r_min: int, r_max: int
) -> None:
    limits = dict.fromkeys(components, r_max)
    found = exchange(components, count, candidates=candidates, r_min=r_min, r_max=limits)
    assert found == ela_exchange(components, count, candidates, r_min, r_max)
    assert len(found.dropped) == len(found.expanded) <= count
    assert len(set(found.dropped)) == len(found.dropped)


def test_the_budget_falls_by_a_cubic() -> None:
    assert [cubic_budget(72, 48, p) for p in (0.0, 0.25, 0.5, 1.0)] == [72, 58, 51, 48]
    components = {"a": (3.0, 1.0, 2.0), "b": (0.5, 4.0, 0.1)}
    policy = AdaLoraPolicy(AllocationConfig(r_min=0, target_r=1))
    first, last = (policy.plan(statistics(components, progress=p)) for p in (0.0, 1.0))
    assert not first.changed({"a": 3, "b": 3})
    assert last.keep == {"a": (0,), "b": (1,)}
    assert last.ranks == {"a": 1, "b": 1}
    assert AdaLoraPolicy(AllocationConfig()).plan(statistics(components, progress=1.0)).budget == 4, "3 / 1.5 a layer"


def test_a_layer_can_lose_one_component_and_get_another() -> None:
    plan = ElaLoraPolicy(AllocationConfig(moves=1)).plan(
        statistics({"a": (5.0, 9.0), "b": (6.0,), "c": (7.0,)}, progress=0.0)
    )
    assert plan.ranks == {"a": 2, "b": 1, "c": 1}
    assert plan.keep == {"a": (1,), "b": (0,), "c": (0,)}
    assert plan.changed({"a": 2, "b": 1, "c": 1}) == ["a"]
    assert plan.digest() != dataclasses.replace(plan, keep={**plan.keep, "a": (0,)}).digest()
    last = ElaLoraPolicy(AllocationConfig(moves=1)).plan(statistics({"a": (5.0, 9.0), "b": (6.0,)}))
    assert last.changed({"a": 2, "b": 1}) == [], "no moves at the last event"


def random_state(*shape: int) -> ParamState:
    return ParamState(torch.randn(shape), torch.randn(shape), torch.rand(shape))


@pytest.mark.parametrize("triplets", [True, False])
def test_what_stays_is_untouched_and_what_is_new_changes_nothing(triplets: bool) -> None:
    torch.manual_seed(0)
    a, b, e = random_state(4, 9), random_state(7, 4), random_state(4) if triplets else None
    (new_a, new_b, new_e), error = rearrange(a, b, e, (1, 3), 4, grow_init="orthogonal", generator=torch.Generator())
    for part in ("value", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(new_a, part)[:2], getattr(a, part)[[1, 3]])
        assert torch.equal(getattr(new_b, part)[:, :2], getattr(b, part)[:, [1, 3]])
    diagonal = torch.eye(4) if e is None else e.value.diag()
    after = torch.eye(4) if new_e is None else new_e.value.diag()
    kept = torch.tensor([0.0, 1.0, 0.0, 1.0]).diag()
    before, expected = b.value @ diagonal @ a.value, b.value @ diagonal @ kept @ a.value
    assert torch.allclose(new_b.value @ after @ new_a.value, expected, atol=1e-5)
    assert error == pytest.approx(float((before - expected).norm() / before.norm()), abs=1e-5)
    assert torch.allclose(new_a.value[2:] @ new_a.value[:2].T, torch.zeros(2, 2), atol=1e-5)
    assert not new_a.exp_avg[2:].any()
    assert torch.allclose(new_a.exp_avg_sq[2:], new_a.exp_avg_sq[:2].mean(0).expand(2, -1))
    assert bool(new_b.value[:, 2:].any()) == triplets, "a zero in E and one in B would never learn"
    if new_e is not None:
        assert new_e.value.shape == (4,)
        assert not new_e.value[2:].any()


def test_triplets_without_a_choice_keep_the_most_important() -> None:
    a, b = ParamState(torch.ones(3, 2), torch.zeros(3, 2), torch.zeros(3, 2)), ParamState.fresh(torch.ones(2, 3))
    e = ParamState(torch.ones(3), torch.tensor([0.2, -3.0, 0.1]), torch.zeros(3))
    assert most_important(a, b, e, 2) == (0, 1)
    (new_a, _, new_e), _ = rearrange(a, b, e, (), 2, grow_init="gaussian", generator=torch.Generator())
    assert new_a.value.shape == (2, 2)
    assert new_e is not None and not new_e.value.any()


def test_fresh_triplets_of_other_ranks_are_alive() -> None:
    """Ranks of a file: E is zero, so that B must not be, or nothing would ever get a gradient."""
    model = _OneLayer()
    start_with_ranks(model, {"layer": 2}, seed=3)
    parts = {side: getattr(model.layer, f"lora_{side}")[ADAPTER].weight for side in "ABE"}
    assert [tuple(part.shape) for part in parts.values()] == [(2, 5), (6, 2), (2,)]
    assert bool(parts["A"].any()) and bool(parts["B"].any()) and not bool(parts["E"].any())
    parts["E"].data.copy_(torch.tensor([2.0, -1.0]))
    state = TrainState({name: ParamState.fresh(param.detach()) for name, param in model.named_parameters()})
    a, b, scaling = layer_factors(model, state)["layer"]
    x = torch.randn(3, 5)
    expected = model.layer.get_base_layer()(x) + scaling * x @ a.T @ b.T
    assert torch.allclose(model.layer(x), expected, atol=1e-6)


@pytest.mark.parametrize("side", ["A", "B"])
def test_the_penaltys_gradient_is_autograds(side: str) -> None:
    factor = torch.randn(3, 8, dtype=torch.float64) if side == "A" else torch.randn(8, 3, dtype=torch.float64)
    factor.requires_grad_()
    covariance = factor @ factor.T if side == "A" else factor.T @ factor
    torch.linalg.matrix_norm(covariance - torch.eye(3)).backward()
    assert factor.grad is not None
    assert torch.allclose(distance_gradient(factor.detach(), side), factor.grad)
    assert not distance_gradient(torch.eye(3), side).any(), "nothing to add where the factor is orthogonal"


class _OneLayer(torch.nn.Module):
    """A PEFT model of one linear layer, of triplets."""

    def __init__(self) -> None:
        from peft.tuners.lora import Linear, LoraConfig

        super().__init__()
        self.layer = Linear(torch.nn.Linear(5, 6), ADAPTER, config=LoraConfig(r=3), r=3, lora_alpha=3)
        self.layer.lora_B[ADAPTER].weight.data.normal_()
        add_diagonal(self.layer, Diagonal(3))
        self.layer.lora_E[ADAPTER].weight.data.normal_()


def test_importances_are_adaloras_and_new_components_are_no_worse_for_their_age() -> None:
    torch.manual_seed(1)
    model = _OneLayer()
    tracker = ImportanceTracker(SensitivityConfig(window=None, uncertainty=0.85), events=(4, 9))
    tracker.attach(model)
    params = [model.layer.lora_A, model.layer.lora_B, model.layer.lora_E]
    history: list[list[torch.Tensor]] = []
    for step in range(4):
        tracker.start_step(step, loss_scale=2.0)
        grads = [torch.zeros_like(p[ADAPTER].weight) for p in params]
        for _ in range(2):  # micro-batches, of gradients twice as large as the step's share
            tracker.start_micro_batch(4, 0)
            loss = model.layer(torch.randn(4, 5)).square().mean()
            (2 * loss).backward()
            for grad, p in zip(grads, params, strict=True):
                grad += p[ADAPTER].weight.grad / 2
                p[ADAPTER].weight.grad = None
        tracker.end_step(taken=step != 2)
        if step != 2:
            values = [(p[ADAPTER].weight * g).abs().detach() for p, g in zip(params, grads, strict=True)]
            history.append([values[0], values[1].T, values[2][:, None]])
    (scores,) = tracker.reduce(World()).values()
    assert scores == pytest.approx(smoothed(history, 0.85, 0.85).tolist(), rel=1e-4)
    state = tracker.state_dict()
    plan = Plan({"layer": 3}, 1.0, 3, {}, {}, keep={"layer": (0, 2)})
    tracker.follow(plan, {"layer": 3})
    assert tracker.reduce(World())["layer"] == pytest.approx([scores[0], scores[2], 0.0])
    tracker.load_state_dict(state)
    assert tracker.reduce(World())["layer"] == scores


def test_the_papers_methods_are_presets() -> None:
    tree = config_tree()
    tree["adapter"] = {"method": "adalora", "r": 6}
    config = parse_config(tree)
    assert (config.adapter.type, config.allocation.policy, config.sampling.selector) == ("svd", "adalora", "full")
    assert (config.sensitivity.uncertainty, config.sensitivity.window, config.allocation.r_min) == (0.85, None, 0)
    assert config.adapter.orthogonality == 0.1
    assert parse_config({**tree, "sensitivity": {"uncertainty": None}}).sensitivity.uncertainty is None
    tree["adapter"] = {"method": "elalora"}
    config = parse_config(tree)
    assert (config.adapter.type, config.allocation.policy, config.adapter.orthogonality) == ("svd", "elalora", 0.0)
    assert (config.sensitivity.uncertainty, config.sensitivity.window, config.allocation.r_min) == (0.85, None, 1)


def test_a_method_of_the_command_line_brings_its_own_values(tmp_path: Path) -> None:
    """Also where a config spells out every key, as a run's does."""
    written = tmp_path / "config.yaml"
    written.write_text(parse_config(config_tree()).to_yaml(), encoding="utf-8")
    config = load_config(written, ["adapter.method=adalora"])
    assert (config.sensitivity.uncertainty, config.sensitivity.window, config.allocation.r_min) == (0.85, None, 0)
    assert config.adapter.orthogonality == 0.1
    assert load_config(written, as_overrides({"adapter.method": "adalora"})) == config, "in quotes, too"
    written.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(written, []) == config
    assert load_config(written, ["adapter.method=lora"]).adapter.orthogonality == 0.0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapter": {"method": "adalora", "r": 4}, "allocation": {"target_r": 5}}, "'allocation.target_r' (5)"),
        (
            {"adapter": {"method": "elalora"}, "allocation": {"max_change": 1}},
            "'allocation.max_change' is for policies",
        ),
        ({"adapter": {"type": "svd"}}, "'resize.shrink: svd' mixes components"),
        ({"adapter": {"orthogonality": 0.1}}, "'adapter.orthogonality' (0.1) is for factors with a diagonal"),
        (
            {"adapter": {"method": "adalora"}, "sampling": {"selector": "quality"}, "scoring": {"warmup_steps": 0}},
            "no sample has a gradient",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line(sections: dict[str, Any], message: str) -> None:
    tree = config_tree()
    with pytest.raises(UserError) as error:
        parse_config({**tree, **sections})
    assert message in str(error.value)


def test_the_only_event_of_a_run_moves_components() -> None:
    """As the first of many, which it is, and not as the last, which moves none."""
    components = {"a": (5.0, 4.0, 3.0), "b": (0.1, 0.2, 0.3)}
    policy = ElaLoraPolicy(AllocationConfig(policy="elalora", moves=1, candidates=1))
    given = statistics(components, progress=1.0)
    assert policy.plan(given).ranks == given.ranks
    assert policy.plan(dataclasses.replace(given, is_first=True)).ranks == {"a": 4, "b": 2}


def test_a_method_of_the_command_line_leaves_nothing_of_the_files_own(tmp_path: Path) -> None:
    written = tmp_path / "config.yaml"

    def told(tree: dict[str, Any], *overrides: str) -> Any:
        written.write_text(parse_config(tree).to_yaml(), encoding="utf-8")
        return load_config(written, list(overrides))

    usual = parse_config(config_tree())
    for name in ("adalora", "elalora", "loratrf"):
        config = told(config_tree(adapter={"method": name}), "adapter.method=tsqlora")
        assert (config.sensitivity, config.allocation) == (usual.sensitivity, usual.allocation), name
        assert config.adapter.target_modules == "auto"
        assert told(config_tree(adapter={"method": "lora"}), f"adapter.method={name}") == parse_config(
            config_tree(adapter={"method": name})
        )
    assert told(config_tree(adapter={"method": "adalora"}), "adapter.method=elalora").allocation.r_min == 1
    # what the file says itself stays
    assert told(config_tree(allocation={"r_min": 0}), "adapter.method=tsqlora").allocation.r_min == 0
    own = config_tree(adapter={"method": "lora", "target_modules": ["query"]})
    assert told(own, "adapter.method=loratrf").adapter.target_modules == ["query"]
    # the usual layers are no choice of the file's, in a short one either
    written.write_text(yaml.safe_dump(config_tree(adapter={"target_modules": "auto"})), encoding="utf-8")
    assert load_config(written, ["adapter.method=loratrf"]).adapter.target_modules == "loratrf"
    assert load_config(written, ["adapter.method=lora"]).adapter.target_modules == "auto"


def test_no_method_sets_nothing() -> None:
    config = parse_config(config_tree(adapter={"method": None}))
    assert (config.adapter.method, config.adapter.type, config.sampling.selector) == (None, "lora", "quality")
