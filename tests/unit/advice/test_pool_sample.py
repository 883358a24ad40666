"""What a trial must not have seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tsqlora_scale.advice.pool_sample import PoolSample

NOTHING: Any = None


def sample(copies: list[int], queried: int) -> PoolSample:
    count = len(copies) - queried
    return PoolSample(
        size=count, rows=np.arange(count), query=count + np.arange(queried), states=NOTHING, numbers=NOTHING,
        shape=NOTHING, copies=np.array(copies), weights=NOTHING, seconds=0.0,
    )  # fmt: skip


@given(st.lists(st.integers(0, 12), min_size=6, max_size=12), st.lists(st.booleans(), min_size=4, max_size=4))
def test_rows_held_out_are_held_out_with_their_copies(copies: list[int], held_out: list[bool]) -> None:
    found = sample(copies, 4).without(np.array(held_out))
    hidden = {group for group, out in zip(copies[-4:], held_out, strict=True) if out}
    expected = [group not in hidden for group in copies]
    if any(expected[-4:]):
        assert found[-4:].tolist() == expected[-4:]
    else:
        assert found[-4:].tolist() == [not out for out in held_out]
    if any(expected[:-4]):
        assert found[:-4].tolist() == expected[:-4]
    else:
        assert found[:-4].all()
