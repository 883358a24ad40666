"""Rules of other methods run through the loop as they are: resizing, moments and files know nothing of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tests.policies import AdaLoraRule, ElaLoraRule
from tests.runs import go, losses_of, ranks_of, run_tree
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.ranks import Plan, Policy, Statistics, current_ranks
from tsqlora_scale.ranks.install import factor_names
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.training import adapt_ranks, train_step


@dataclasses.dataclass
class Spy:
    """Another policy, and what it was told."""

    needs_components: ClassVar[bool] = True

    policy: Policy
    seen: list[Statistics] = dataclasses.field(default_factory=list)

    def plan(self, stats: Statistics) -> Plan:
        self.seen.append(stats)
        return self.policy.plan(stats)


def test_adaloras_rule(tmp_path: Path, models_dir: Path) -> None:
    """Its budget is kept to the rank, layers may end without an adapter, and what stays is what it chose."""
    tree = run_tree("bert", tmp_path, models_dir, "run", resize={"shrink": "importance"})
    tree["schedule"] = {"start": 4, "end": 12, "every": 4}
    spy = Spy(AdaLoraRule(final=16))
    go(tree, policy=spy)
    events = ranks_of(tmp_path / "runs" / "run")
    assert [stats.progress for stats in spy.seen] == [0.0, 0.5, 1.0]
    assert [sum(ranks.values()) for ranks in events] == [48, 20, 16]
    assert 0 in events[-1].values()
    for stats, ranks in zip(spy.seen, events, strict=True):
        assert {name: len(scores) for name, scores in stats.components.items()} == stats.ranks
        kept = [s for n, scores in stats.components.items() for s in sorted(scores)[len(scores) - ranks[n] :]]
        lost = [s for n, scores in stats.components.items() for s in sorted(scores)[: len(scores) - ranks[n]]]
        assert min(kept) >= max(lost, default=0.0)
    assert len(losses_of(tmp_path / "runs" / "run")) == 13


def test_elaloras_rule(tmp_path: Path, models_dir: Path) -> None:
    spy = Spy(ElaLoraRule(b=6, k=2))
    go(run_tree("bert", tmp_path, models_dir, "run", resize={"shrink": "importance"}), policy=spy)
    first, second = ranks_of(tmp_path / "runs" / "run")
    assert sum(first.values()) == sum(second.values()) == 48
    assert sum(abs(rank - 4) for rank in first.values()) > 0
    assert second == first, "b has fallen to 0 at the last event"


@pytest.mark.parametrize("init", ["orthogonal", "gaussian", "gradient"])
def test_the_step_after_an_event_moves_nothing_by_more_than_the_learning_rate(
    tmp_path: Path, models_dir: Path, init: str
) -> None:
    """With the engine's own optimizer: components that are new, and layers that come back from rank 0."""

    class Scripted:
        needs_components: ClassVar[bool] = False

        def plan(self, stats: Statistics) -> Plan:
            choices = (0, 4, 4) if 0 not in stats.ranks.values() else (4, 7, 4)
            ranks = {name: choices[i % 3] for i, name in enumerate(stats.ranks)}
            return Plan(ranks=ranks, phi=1.0, budget=0, sensitivity={}, reasons={})

    tree = run_tree("bert", tmp_path, models_dir, "run", resize={"grow_init": init})
    tree["sampling"], tree["scoring"] = {"selector": "full"}, {"enabled": False}
    tree["train"]["max_steps"] = 40
    run = build_run(preflight.check(parse_config(tree)))
    run.policy = Scripted()
    for event in (15, 30):
        while run.step < event:
            train_step(run)
        adapt_ranks(run)
    before = run.engine.gather()
    train_step(run)
    after = run.engine.gather()
    assert after.optimizer_steps == 31, "Adam's count goes on"
    moved = []
    for i, name in enumerate(current_ranks(run.engine.module)):
        new = (slice(0, 4), slice(4, 7), slice(4, 4))[i % 3]
        name_a, name_b = factor_names(name)
        steps = [after.params[n].value - before.params[n].value for n in (name_a, name_b)]
        for step in (steps[0][new], steps[1][:, new]):
            assert (step.abs() <= 1e-2 * (1 + 1e-4)).all(), name
        moved.append(float(steps[1][:, new].abs().sum()))
        if i % 3 < 2:
            assert not before.params[name_b].value[:, new].any()
            assert not before.params[name_b].exp_avg[:, new].any()
            assert (before.params[name_b].exp_avg_sq[:, new] > 0).all()
    assert all((m > 0) == (i % 3 < 2) for i, m in enumerate(moved)), "new components learn at once"
    assert torch.isfinite(torch.tensor(moved)).all()
