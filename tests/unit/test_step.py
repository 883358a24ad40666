"""Micro-batches and dropout masks belong to the global batch, not to the rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runs import go, run_tree
from tsqlora_scale.common.random_streams import seed_dropout
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.quality.selectors.by_quality import QualitySelector
from tsqlora_scale.ranks.controller import FixedRanks
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.step import micro_batches, optimizer_step


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_place_in_the_global_batch(world_size: int, micro_batch_size: int) -> None:
    """``number * world_size + rank``, by which dropout is seeded, is the micro-batch's place among all."""
    indices = np.random.default_rng(0).permutation(72)
    whole = micro_batches(indices, micro_batch_size, 0, 1)
    for rank in range(world_size):
        mine = micro_batches(indices, micro_batch_size, rank, world_size)
        assert len(mine) == len(whole) // world_size
        for number, part in enumerate(mine):
            assert part.tolist() == whole[number * world_size + rank].tolist()


def test_masks_are_a_function_of_seed_step_and_place() -> None:
    def mask(*place: int) -> tuple[float, ...]:
        seed_dropout(*place)
        return tuple(torch.rand(4).tolist())

    places = [(seed, step, number) for seed in (0, 1) for step in (0, 1, 11) for number in (0, 1, 11)]
    masks = [mask(*place) for place in places]
    assert len(set(masks)) == len(places)
    assert [mask(*place) for place in reversed(places)] == masks[::-1]


def test_every_generator_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all accelerators of the kind that there is, with the seed that the CPU's has."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    seed_dropout(1, 2, 3)
    assert seeds == [torch.initial_seed()]
    seed_dropout(1, 2, 4)
    assert seeds[1] == torch.initial_seed() != seeds[0]


def test_weights_of_the_losses_are_normalised_over_the_step(tmp_path: Path, models_dir: Path) -> None:
    """Two micro-batches, weighted: the loss and the gradient are those of the weighted mean over the step."""
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"micro_batch_size": 6, "max_grad_norm": None})
    run = build_run(preflight.check(parse_config(tree)))
    indices, weights = np.arange(12), np.linspace(0.5, 3, 12)
    module = run.engine.module.train()
    sums, counts = run.task.loss_sums(module(**(batch := run.task.batch(indices)).inputs), batch)
    expected = (sums * torch.from_numpy(weights).float()).sum() / weights.sum()
    wanted = torch.autograd.grad(expected, [p for _, p in sorted(module.named_parameters()) if p.requires_grad])
    result = optimizer_step(
        run.engine,
        run.task,
        indices,
        listener=FixedRanks(),
        step=0,
        lr=0.0,
        micro_batch_size=6,
        seed=0,
        weights=weights * 7,
    )
    assert result.loss == pytest.approx(expected.item(), rel=1e-5)
    assert result.grad_norm == pytest.approx(torch.cat([g.flatten() for g in wanted]).norm().item(), rel=1e-4)
    assert counts.sum() == 12


def test_an_unbiased_run_weighs_by_its_own_scores(tmp_path: Path, models_dir: Path) -> None:
    run = go(run_tree("bert", tmp_path, models_dir, "run", sampling={"unbiased": True, "max_weight": 1.5}))
    assert isinstance(run.selector, QualitySelector)
    chosen, p = run.selector.scorer.draws()
    weights = run.selector.weights(np.arange(48))
    assert weights is not None
    np.testing.assert_allclose(weights[chosen], np.minimum(1 / (len(chosen) * p), 1.5))
    assert weights.max() == 1.5
