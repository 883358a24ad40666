"""Rules of other methods run through the loop as they are: resizing, moments and files know nothing of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.policies import AdaLoraRule
from tests.runs import go, losses_of, ranks_of, run_tree
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.ranks import current_ranks
from tsqlora_scale.ranks.install import factor_names
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.training import take_steps


def test_adaloras_rule(tmp_path: Path, models_dir: Path) -> None:
    """Its budget is kept to the rank, layers may end without an adapter, and what stays is what it chose."""
    tree = run_tree("bert", tmp_path, models_dir, "run", resize={"shrink": "importance"})
    tree["schedule"] = {"start": 4, "end": 12, "every": 4}
    tree["allocation"] = {"policy": "tests.policies:AdaLoraRule"}
    go(tree)
    events = ranks_of(tmp_path / "runs" / "run")
    assert [stats.progress for stats in AdaLoraRule.told] == [0.0, 0.5, 1.0]
    assert [sum(ranks.values()) for ranks in events] == [48, 20, 16]
    assert 0 in events[-1].values()
    for stats, ranks in zip(AdaLoraRule.told, events, strict=True):
        assert {name: len(scores) for name, scores in stats.components.items()} == stats.ranks
        kept = [s for n, scores in stats.components.items() for s in sorted(scores)[len(scores) - ranks[n] :]]
        lost = [s for n, scores in stats.components.items() for s in sorted(scores)[: len(scores) - ranks[n]]]
        assert min(kept) >= max(lost, default=0.0)
    assert len(losses_of(tmp_path / "runs" / "run")) == 13


def test_elaloras_rule(tmp_path: Path, models_dir: Path) -> None:
    sections = {"resize": {"shrink": "importance"}, "allocation": {"policy": "tests.policies:ElaLoraRule"}}
    go(run_tree("bert", tmp_path, models_dir, "run", **sections))
    first, second = ranks_of(tmp_path / "runs" / "run")
    assert sum(first.values()) == sum(second.values()) == 48
    assert sum(abs(rank - 4) for rank in first.values()) > 0
    assert second == first, "b has fallen to 0 at the last event"


@pytest.mark.parametrize("init", ["orthogonal", "gaussian", "gradient"])
def test_the_step_after_an_event_moves_nothing_by_more_than_the_learning_rate(
    tmp_path: Path, models_dir: Path, init: str
) -> None:
    """With the engine's own optimizer: components that are new, and layers that come back from rank 0."""
    tree = run_tree("bert", tmp_path, models_dir, "run", resize={"grow_init": init})
    tree["sampling"], tree["allocation"] = {"selector": "full"}, {"policy": "tests.policies:Scripted"}
    tree["schedule"] = {"start": 15, "end": 30, "every": 15}
    tree["train"]["max_steps"] = 40
    run = build_run(preflight.check(parse_config(tree)))
    take_steps(run, until=30)
    before = run.engine.gather()
    take_steps(run, until=31)
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
