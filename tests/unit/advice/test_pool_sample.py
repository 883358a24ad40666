"""What a trial must not have seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.mixed import mixed_tree, words
from tsqlora_scale.advice.adapter_pilot import draw_weights
from tsqlora_scale.advice.pool_sample import PoolSample, look_at_sample
from tsqlora_scale.advice.query_choice import choice_by_others
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run

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


def test_trials_draw_from_the_sets_of_a_mixture_as_a_run_does(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half from each, whatever is chosen."""
    tree = mixed_tree(tmp_path, models_dir, "run", selector="query")
    tree["task"] |= {"query": str(tmp_path / "query.jsonl")}
    words(tmp_path / "query.jsonl", 10, "text", "label", 3)
    config = parse_config(tree)
    run = build_run(preflight.check(config), writes=False)
    sample = look_at_sample(run, 2000)
    assert (sample.count, len(sample.query)) == (48, 10)
    chosen = np.where(np.arange(48) < 36, 1.0, 0.1)

    def choice(*given: Any, **named: Any) -> tuple[Any, np.ndarray]:
        return choice_by_others(*given, **named)[0], chosen

    monkeypatch.setattr("tsqlora_scale.advice.adapter_pilot.choice_by_others", choice)
    found = draw_weights(config, sample, np.zeros(10, dtype=bool), classes=2)
    for way in ("even", "query", "pool alone"):
        drawn = found[way][:48]
        assert drawn[:36].sum() == pytest.approx(drawn[36:].sum())
        assert np.ptp(drawn[:36]) == pytest.approx(0) and np.ptp(drawn[36:]) == pytest.approx(0)
    assert found["even"][48:].tolist() == found["query"][48:].tolist() == [1.0] * 10
    run.engine.close()
