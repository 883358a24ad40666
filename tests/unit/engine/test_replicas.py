"""Ranks that hold the same, and which of them does not."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.worlds import run_on_ranks
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.replicas import Holdings, ReplicasDiffer, compare
from tsqlora_scale.engine.train_state import ParamState, TrainState


def state_of(seed: int = 0, steps: int = 3) -> TrainState:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(4, 1, generator=generator) for _ in range(6)]
    return TrainState({"a": ParamState(*values[:3]), "b": ParamState(*(v.T for v in values[3:]))}, steps)


def said(world: World, fault: str, at: int) -> str:
    state, faults = state_of(), []
    if world.rank == at:
        if fault == "moment":
            state.params["b"].exp_avg_sq[0, 2] += 1e-6
        elif fault == "steps":
            state.optimizer_steps = 4
        elif fault == "missing":
            del state.params["a"]
        elif fault == "own":
            faults = ["c was made after the engine started"]
    try:
        compare(world, Holdings.from_state(state, faults), when="here")
    except ReplicasDiffer as error:
        return str(error)
    return ""


def everything(world: World) -> list[str]:
    return [said(world, fault, 2) for fault in ("", "moment", "steps", "missing", "own")] + [said(world, "moment", 0)]


def test_the_rank_that_is_not_as_most_are_is_named_on_all() -> None:
    found: list[Any] = run_on_ranks(everything, 3)
    assert found[0] == found[1] == found[2]
    same, moment, steps, missing, own, first = found[0]
    assert same == ""
    assert "rank 2 of 3 differs in exp_avg_sq of b)" in moment
    assert "rank 2 of 3 differs in optimizer_steps)" in steps
    assert "rank 2 of 3 differs in value of a, exp_avg of a, exp_avg_sq of a)" in missing
    assert "(rank 2: c was made after the engine started)" in own
    assert "rank 0 of 3 differs in exp_avg_sq of b)" in first


@given(place=st.integers(0, 3), part=st.sampled_from(["value", "exp_avg", "exp_avg_sq"]), name=st.sampled_from("ab"))
def test_one_bit_anywhere_changes_one_digest(place: int, part: str, name: str) -> None:
    changed = state_of()
    getattr(changed.params[name], part).reshape(-1).numpy().view("int32")[place] ^= 1
    before, after = Holdings.from_state(state_of(), []).digests, Holdings.from_state(changed, []).digests
    assert [key for key in before if before[key] != after[key]] == [f"{part} of {name}"]


def test_moments_of_before_the_first_step_are_not_asked() -> None:
    assert set(Holdings.from_state(state_of(steps=0), []).digests) == {"value of a", "value of b", "optimizer_steps"}
