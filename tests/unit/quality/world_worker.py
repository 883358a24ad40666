"""One rank of a small gloo world that scores tiny pools; run by test_scorer in processes of its own."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path

import torch
from torch import nn

from tests.unit.quality.toys import RandomPool, lora_model, scorer
from tsqlora_scale.common import disk_arrays
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality import ScoreTable

#: model, pool size, scoring options: batched; one at a time on a subsample; fewer samples than ranks
CASES: dict[str, tuple[str, int, dict]] = {
    "batched": ("bert", 11, {}),
    "one_at_a_time": ("deberta", 7, {"max_samples": 5}),
    "fewer_samples_than_ranks": ("bert", 2, {"delta_loss": "first_order"}),
}


def train_a_little(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """A copy with moved factors."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def tables(case: str, folder: Path, world: World) -> list[ScoreTable]:
    """The table of a full pass and of a refresh."""
    kind, size, options = CASES[case]
    model, pool = lora_model(kind, folder), RandomPool(kind, size)
    made = scorer(pool, world=world, sampling={"keep_fraction": 0.6}, refresh_fraction=0.5, **options)
    return [made.score(model), made.score(train_a_little(model), refresh=True)]


def tables_of_rank(world: World, folder: Path) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Every case's tables, as they are in a world of several ranks."""
    if world.size == 3:  # as in a large pool, which changes nothing
        disk_arrays.IN_MEMORY = 0
    return {case: [t.state_dict() for t in tables(case, folder, world)] for case in CASES}


def ends_without_space(world: World, folder: Path) -> list[str]:
    """How passes end with a disk of rank 1 that is full from its n-th column on, for every n."""
    disk_arrays.IN_MEMORY = 0
    left, reserve = 0, os.posix_fallocate

    def reserved(file: int, offset: int, length: int) -> None:
        nonlocal left
        left -= 1
        if world.rank == 1 and left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(file, offset, length)

    os.posix_fallocate = reserved
    model, pool = lora_model("bert", folder), RandomPool("bert", 5)
    ends: list[str] = []
    for fills_in in ("first", "refresh"):
        count = 0
        while not ends or ends[-1] != f"{fills_in} done":
            left = count if fills_in == "first" else 10**6
            try:
                made = scorer(
                    pool, world=world, sampling={"keep_fraction": 0.6, "redundancy": 1.0}, delta_loss="first_order"
                )
                made.score(model)
                left = count
                if fills_in == "refresh":
                    made.score(model, refresh=True)
                ends.append(f"{fills_in} done")
            except UserError as error:
                ends.append(str(error))
            count += 1
    return ends
