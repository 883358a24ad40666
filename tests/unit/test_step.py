"""Micro-batches and dropout masks belong to the global batch, not to the rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tsqlora_scale.step import micro_batches, seed_dropout


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
