"""Ranks that the tests start: their results, and how a rank that fails, vanishes or hangs is told."""

from __future__ import annotations

import os
import time

import pytest
import torch

from tests.worlds import run_on_ranks
from tsqlora_scale.engine.collectives import World

pytestmark = pytest.mark.distributed


def place(world: World, word: str) -> tuple[int, int, int, list[str]]:
    return world.rank, world.size, torch.get_num_threads(), world.gather_objects(f"{word} {world.rank}")


def end_badly(world: World, how: str) -> None:
    if world.rank == 1:
        {"fail": fail, "vanish": vanish, "hang": hang}[how]()
    world.barrier()


def fail() -> None:
    raise KeyError("no such shelf")


def vanish() -> None:
    os._exit(7)


def hang() -> None:
    time.sleep(1000)


def test_results_come_in_rank_order() -> None:
    everyone = ["word 0", "word 1", "word 2"]
    assert run_on_ranks(place, 3, "word", threads=2) == [(rank, 3, 2, everyone) for rank in range(3)]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("fail", ["rank 1 failed:\nTraceback", "in fail", "KeyError: 'no such shelf'"]),
        ("vanish", ["rank 1 ended with exit code 7"]),
        ("hang", ["rank 1 was still running:", "in hang"]),
    ],
)
def test_a_rank_that_ends_badly_is_named(how: str, words: list[str]) -> None:
    """And no rank is waited for that waits for it."""
    started = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        run_on_ranks(end_badly, 2, how, timeout=8 if how == "hang" else 60)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    if how == "fail":
        assert str(caught.value).startswith("rank 1"), "the first cause first"
    assert time.monotonic() - started < 50
