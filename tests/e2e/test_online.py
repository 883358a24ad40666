"""``scoring.source: online``: what the steps say is what a pass says, and a run by it is a run like any other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.runs import go, losses_of, read_lines, run_tree
from tests.steps import Killed, killed_in_step
from tsqlora_scale import training as loop
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.model.adapters.lora import theta_modules
from tsqlora_scale.quality import QualityScorer, ScoreTable
from tsqlora_scale.quality.selectors.by_steps import OnlineSelector
from tsqlora_scale.quality.selectors.selector import SelectorContext
from tsqlora_scale.ranks import current_ranks
from tsqlora_scale.ranks.policies.policy import Plan
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.plan import plan_run
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.step import optimizer_step

ONLINE: dict[str, Any] = {"source": "online", "sketch_dim": 64, "warmup_steps": 0}


def online_tree(kind: str, folder: Path, models: Path, name: str = "run", **sections: dict[str, Any]) -> dict[str, Any]:
    """A run of 13 steps on 48 samples, 12 a step: the first epoch ends after step 4, where ranks change, too."""
    tree = run_tree(kind, folder, models, name, **sections)
    tree["scoring"] = ONLINE | sections.get("scoring", {})
    return tree


def lines_of(path: Path) -> list[dict[str, Any]]:
    """A record without its times."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_lines(path)]


def scores_of(run: Run) -> OnlineSelector:
    assert isinstance(run.selector, OnlineSelector)
    return run.selector


def passed(run: Run) -> ScoreTable:
    """A full pass at the run's present parameters, to first order."""
    config = run.config
    scorer: QualityScorer[Any] = QualityScorer(
        config.scoring.model_copy(update={"source": "pass", "batch_size": 8}),
        config.sampling,
        pool=run.task,
        theta=partial(scores_of(run).context.theta, include_head=config.scoring.include_head),
        world=run.engine.world,
        seed=config.run.seed,
        eta=config.train.lr,
    )
    return scorer.score(run.engine.module)


def visit(run: Run, rows: np.ndarray, **options: Any) -> None:
    """A step that moves nothing, but for moments."""
    optimizer_step(
        run.engine,
        run.task,
        rows,
        listener=run.ranks,
        samples=run.selector.listener,
        step=run.step,
        lr=0.0,
        micro_batch_size=run.plan.micro_batch_size,
        seed=1,
        **options,
    )


@pytest.mark.parametrize(
    ("kind", "model", "weighted"),
    [
        ("bert", {}, True),
        ("llama", {"gradient_checkpointing": True}, True),
        ("bart", {}, False),
        ("llama", {"quantization": "nf4"}, False),
    ],
    ids=["bert-weighted", "llama-checkpointed", "bart", "llama-nf4"],
)
def test_a_steps_numbers_are_those_of_a_pass(
    kind: str, model: dict[str, Any], weighted: bool, tmp_path: Path, models_dir: Path
) -> None:
    """With accumulation, weights of losses, targets of different lengths; before and after a rank event."""
    run = build_run(preflight.check(parse_config(online_tree(kind, tmp_path, models_dir, model=model))))
    tolerance = 1e-3 if "quantization" in model else 1e-5
    before = set(current_ranks(run.engine.module).values())
    for until in (2, 6):
        loop.take_steps(run, until=until)
        running = scores_of(run).scorer.running
        running.visits[:] = 0
        rows = np.arange(12, 24)
        visit(run, rows, weights=np.linspace(0.3, 4, 12) if weighted else None)
        table = passed(run)
        assert running.visits[rows].tolist() == [1] * 12 and running.visits.sum() == 12
        for name in ("loss", "grad_norm", "delta_loss"):
            found, wanted = getattr(running.table, name)[rows], getattr(table, name)[rows]
            np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())
    assert set(current_ranks(run.engine.module).values()) != before, "an event came between the two"


def test_alignment_is_with_the_direction_of_the_steps_before(tmp_path: Path, models_dir: Path) -> None:
    tree = online_tree("bert", tmp_path, models_dir, scoring={"mean_gradient": "plain"})
    run = build_run(preflight.check(parse_config(tree)))
    scorer = scores_of(run).scorer
    everything = np.arange(48)
    visit(run, everything[:12])
    assert scorer.running.table.convergence[:12].tolist() == [0.0] * 12, "there is none in the very first step"
    for start in (0, 12, 24, 36):
        scorer.running.memory = float(start > 0)  # of theta as it is, as nothing moves it
        visit(run, everything[start : start + 12])
    direction = scorer.running.direction.clone()
    scorer.running.visits[:] = 0
    for start in (0, 12, 24, 36):
        scorer.running.direction = direction.clone()
        visit(run, everything[start : start + 12])
    np.testing.assert_allclose(scorer.running.table.convergence, passed(run).convergence, atol=2e-4)


def test_the_direction_begins_anew_where_ranks_have_changed(tmp_path: Path, models_dir: Path) -> None:
    """Gradients of other factors have other coordinates."""
    run = build_run(preflight.check(parse_config(online_tree("bert", tmp_path, models_dir))))
    running = scores_of(run).scorer.running
    visit(run, np.arange(12))
    kept = run.state_dict()
    assert running.direction.abs().sum() > 0
    names = list(current_ranks(run.engine.module))
    ranks = {name: 2 if place % 2 else 5 for place, name in enumerate(names)}
    plan = Plan(ranks=ranks, phi=1.0, budget=sum(ranks.values()), sensitivity={}, reasons={})
    run.ranks.carry_out(plan, run.engine, 1)
    assert running.direction.abs().sum() == 0
    before = running.visits.copy()
    visit(run, np.arange(12, 24))
    assert (running.visits == before).all() and running.direction.abs().sum() > 0, "nothing to compare with"
    visit(run, np.arange(12, 24))
    assert (running.visits[12:24] == 1).all() and running.table.convergence[12:24].all()
    scores_of(run).load_state_dict(kept["selector"])
    assert running.direction.abs().sum() > 0, "a resumed run goes on with what it had"


def test_the_first_epoch_is_even_and_the_same_training(tmp_path: Path, models_dir: Path) -> None:
    """Listening changes no step; after that draws are by p, from S, and p moves at epochs and events."""
    run = go(online_tree("bert", tmp_path, models_dir, "online", scoring={"warmup_steps": 2}))
    go(run_tree("bert", tmp_path, models_dir, "full", sampling={"selector": "full"}))
    found, plain = (losses_of(tmp_path / "runs" / name) for name in ("online", "full"))
    assert found[:4] == pytest.approx(plain[:4], abs=1e-6)
    assert found[4:] != pytest.approx(plain[4:], abs=1e-3)
    selector = scores_of(run)
    counted = 13 - 2 - 2  # those of the warm-up do not count, nor those of the steps behind the two events
    assert selector.scorer.running.visits.sum() == counted * 12
    assert selector.table is not None and selector.table.selected.sum() == 36
    chosen, p = selector.scorer.draws()
    assert p.max() > 2 * p.min()
    written = sorted(path.name for path in (tmp_path / "runs" / "online" / "scores").iterdir())
    assert written == [f"pass-00{n}.parquet" for n in range(4)], "after steps 4, 7, 8 (an event) and 11"
    last, _ = ScoreTable.read(tmp_path / "runs" / "online" / "scores")
    np.testing.assert_array_equal(last.loss, selector.table.loss)
    assert set(chosen) == set(np.flatnonzero(last.selected))


@pytest.mark.parametrize(
    ("warmup", "rows", "step"), [(0, 48, 4), (2, 48, 4), (3, 48, 8), (9, 48, 12), (0, 49, 5), (0.5, 48, 12)]
)
def test_when_scores_are_taken_first(warmup: float, rows: int, step: int, tmp_path: Path, models_dir: Path) -> None:
    """At the end of the first epoch of which half or more comes after the warm-up."""
    tree = online_tree("bert", tmp_path, models_dir, scoring={"warmup_steps": warmup})
    plan = plan_run(parse_config(tree), rows, 1)
    assert plan.scoring_step == step
    assert plan.warmup_steps == (7 if warmup == 0.5 else warmup)


def test_when_p_is_taken_anew(tmp_path: Path, models_dir: Path) -> None:
    """Epochs of S are of 3 steps, and start again where p is taken."""

    def steps_of(refresh: Any, events: tuple[int, ...]) -> list[int]:
        config = parse_config(online_tree("bert", tmp_path, models_dir, scoring={"refresh": refresh}))
        pool = preflight.check(config).task
        context = SelectorContext(
            config=config, pool=pool, theta=theta_modules, world=World(), scoring_step=4, events=events
        )
        selector, found = OnlineSelector(context), []
        selector.scorer.running.visit(np.arange(48), np.random.default_rng(0).random((48, 4)))
        for step in range(16):
            if selector.due(step):
                selector.score(torch.nn.Identity(), step)
                found.append(step)
        return found

    assert steps_of("none", (5, 9)) == [4]
    assert steps_of("every_event", (5, 9)) == [4, 5, 8, 9, 12, 15]
    assert steps_of(2, (5, 9)) == [4, 7, 9, 12, 15]


def test_a_run_within_its_first_epoch_draws_evenly_and_says_what_was_seen(tmp_path: Path, models_dir: Path) -> None:
    tree = online_tree("bert", tmp_path, models_dir, allocation={"policy": "fixed"}, train={"max_steps": 3})
    tree["scoring"]["refresh"] = "none"
    run = go(tree)
    assert any("all draws are even" in line for line in run.plan.lines())
    table, _ = ScoreTable.read(tmp_path / "runs" / "run" / "scores")
    assert (table.scoring_pass >= 0).sum() == 36
    assert table.selected.all()
    np.testing.assert_allclose(table.probability, 1 / 48)
    unseen = table.scoring_pass < 0
    np.testing.assert_allclose(table.loss[unseen], table.loss[~unseen].mean())


def test_a_killed_run_goes_on_to_the_bit(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed within the first epoch, and once more after it."""
    sections: dict[str, Any] = {
        "train": {"checkpoint_every": 2, "checkpoint_keep": 1},
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.1},
    }
    whole = go(online_tree("bert", tmp_path, models_dir, "whole", **sections))
    tree = online_tree("bert", tmp_path, models_dir, "killed", **sections)
    for number, step in enumerate((3, 9)):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "optimizer_step", killed_in_step(step))
            with pytest.raises(Killed):
                go(tree, resume="auto" if number else None)
    run = go(tree, resume="auto")
    for name in ("metrics.jsonl", "ranks.jsonl"):
        assert lines_of(tmp_path / "runs" / "killed" / name) == lines_of(tmp_path / "runs" / "whole" / name)
    mine, theirs = scores_of(run).scorer, scores_of(whole).scorer
    for name, column in theirs.running.table.state_dict().items():
        assert torch.equal(mine.running.table.state_dict()[name].nan_to_num(), column.nan_to_num()), name
    assert torch.equal(mine.running.direction, theirs.running.direction)
    np.testing.assert_array_equal(mine.running.visits, theirs.running.visits)


def test_a_sample_without_a_finite_loss_is_the_worst(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its step is left out, and no visit of the others in it counts."""
    poisoned = 5

    run = build_run(preflight.check(parse_config(online_tree("bert", tmp_path, models_dir))))
    loss_sums = run.task.loss_sums

    def with_poison(outputs: Any, batch: Any) -> Any:
        sums, counts = loss_sums(outputs, batch)
        return torch.where(torch.from_numpy(batch.indices == poisoned), torch.nan, sums), counts

    monkeypatch.setattr(run.task, "loss_sums", with_poison)
    loop.take_steps(run, until=4)
    selector = scores_of(run)
    selector.score(run.engine.module, 4)
    running, table = selector.scorer.running, selector.table
    assert table is not None
    assert running.visits[poisoned] == -1
    assert (running.visits == 1).sum() == 36
    assert (running.visits == 0).sum() == 11
    assert np.isnan(table.loss[poisoned])
    assert table.quality[poisoned] == table.quality.min()


def on_weighted_rows(tree: dict[str, Any]) -> Run:
    """A run whose pool gives every second row ten times the weight of the others."""
    folder = Path(tree["task"]["dataset"]["path"])
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    weighted = [f'{line[:-1]}, "weight": {1 + 9 * (i % 2)}}}' for i, line in enumerate(lines)]
    (folder / "train.jsonl").write_text("\n".join(weighted) + "\n", encoding="utf-8")
    tree["task"]["dataset"]["weight"] = "weight"
    return build_run(preflight.check(parse_config(tree)))


def test_weights_of_the_pool_leave_no_sample_out_of_the_first_epoch(tmp_path: Path, models_dir: Path) -> None:
    tree = online_tree("bert", tmp_path, models_dir)
    run = on_weighted_rows(tree)
    drawn = np.concatenate([run.selector.draw(step) for step in range(4)])
    assert sorted(drawn.tolist()) == list(range(48))


def test_weights_of_the_pool_count_where_losses_are_weighed(tmp_path: Path, models_dir: Path) -> None:
    """Once there are scores, as under a pass's: each sample as often as its weight says, and not once an epoch."""
    tree = online_tree("bert", tmp_path, models_dir, sampling={"use": "weight", "keep_fraction": 1.0})
    run = on_weighted_rows(tree)
    with run.record:
        loop.take_steps(run, until=5)
    drawn = np.concatenate([run.selector.draw(step) for step in range(5, 105)])
    assert np.mean(drawn % 2) == pytest.approx(10 / 11, abs=0.03)


def test_a_model_whose_layers_see_no_batch_is_refused(tmp_path: Path, models_dir: Path) -> None:
    run = build_run(preflight.check(parse_config(online_tree("bert", tmp_path, models_dir))))
    scorer = scores_of(run).scorer
    scorer._gradients.detach()
    with pytest.raises(UserError, match=r"^scoring.source='online': no adapted layer .* set scoring.source: pass$"):
        visit(run, np.arange(12))
