"""The collectives in a world of one and among real processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.worlds import run_on_ranks
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.engine.collectives import World


def test_a_world_of_one_needs_no_group() -> None:
    world = World.current()
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    tensor = torch.tensor([1.0, -2.0])
    for reduced in (world.sum(tensor), world.max(tensor), world.mean(tensor)):
        assert torch.equal(reduced, tensor)
        reduced += 1
    assert tensor.tolist() == [1.0, -2.0], "the result is a new tensor"
    assert world.gather_objects("a") == ["a"]
    assert world.broadcast({"a": 1}) == {"a": 1}
    world.barrier()
    with world.together():
        pass
    with pytest.raises(UserError, match="full"), world.together():
        raise UserError("full")


def collectives(world: World) -> dict[str, Any]:
    rank = world.rank
    mine = torch.tensor([float(rank), -float(rank)], dtype=torch.float64)
    out: dict[str, Any] = {
        "place": (world.rank, world.size, world.is_main),
        "sum": world.sum(mine).tolist(),
        "max": world.max(mine).tolist(),
        "mean": world.mean(mine).tolist(),
        "integers": world.sum(torch.tensor([2**40 + rank])).tolist(),
        "kept": mine.tolist(),
        "objects": world.gather_objects({"rank": rank}),
        "broadcast": world.broadcast(f"from {rank}"),
    }
    try:
        with world.together():
            if rank == 1:
                raise UserError("the disk of rank 1 is full")
    except UserError as error:
        out["together"] = str(error)
    world.barrier()
    return out


@pytest.mark.slow
@pytest.mark.distributed
def test_real_ranks_agree() -> None:
    size = 3
    for rank, found in enumerate(run_on_ranks(collectives, size)):
        assert found == {
            "place": (rank, size, rank == 0),
            "sum": [3.0, -3.0],
            "max": [2.0, 0.0],
            "mean": [1.0, -1.0],
            "integers": [3 * 2**40 + 3],
            "kept": [float(rank), -float(rank)],
            "objects": [{"rank": r} for r in range(size)],
            "broadcast": "from 0",
            "together": "the disk of rank 1 is full",
        }
