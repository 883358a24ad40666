"""Properties that every learning-rate schedule has."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqlora_scale.config.schema import TrainConfig
from tsqlora_scale.run.lr_schedule import learning_rate


@given(
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
    total=st.integers(1, 200),
    warmup=st.one_of(st.integers(0, 250), st.floats(0.01, 0.99)),
)
def test_up_then_down_never_zero_never_above(schedule: str, total: int, warmup: float) -> None:
    train = TrainConfig.model_validate(
        {"max_steps": total, "lr": 0.5, "lr_schedule": schedule, "lr_warmup": warmup}
    )  # fmt: skip
    rates = [learning_rate(train, step, total) for step in range(total)]
    assert all(0 < rate <= 0.5 for rate in rates), "a step with a rate of zero would be wasted"
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_warm_up_meets_the_decay_without_a_jump() -> None:
    train = TrainConfig.model_validate({"max_steps": 40, "lr": 1.0, "lr_warmup": 0.25})
    rates = [learning_rate(train, step, 40) for step in range(40)]
    assert rates[9] == rates[10] == 1.0
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) == pytest.approx(0.1)
