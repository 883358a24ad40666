"""Numbers of a study: choice on tuning seeds, pairs, intervals, the way, equal time; against slow references."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.studies.fair import (
    Choice,
    Trial,
    TrialKey,
    after_equal_time,
    auc,
    choose,
    read_trials,
    step_of,
    value_after,
    way,
)
from tsqlora_scale.comparison.estimates import interval, mean_of


def trial(
    values: dict[int, float],
    *,
    seed: int = 0,
    lr: float = 1e-3,
    arm: str = "uniform",
    metric: str = "accuracy",
    **more: float,
) -> Trial:
    """A run whose ``tune`` is as given, whose ``test`` is a tenth more, and whose own rows' loss is the value."""
    curve = {s: {"tune": {metric: v}, "test": {metric: v + 0.1}, "own": {"loss": v}} for s, v in values.items()}
    seconds = {"training": 2.0 * max(values), "scoring": more.get("scoring", 0.0)}
    return Trial(TrialKey("query", "mixed", seed, arm, lr), curve, metric, seconds)


def test_rate_and_step_are_of_the_best_mean_over_the_tuning_seeds() -> None:
    runs = [
        trial({0: 0.9, 25: 0.6, 50: 0.7}, seed=100),
        trial({0: 0.9, 25: 0.8, 50: 0.5}, seed=101),
        trial({0: 0.9, 25: 0.6, 50: 0.75}, seed=100, lr=2e-3),
        trial({0: 0.9, 25: 0.6, 50: 0.63}, seed=101, lr=2e-3),
        trial({25: 1.0, 50: 1.0}, seed=0),  # of another seed
        trial({25: 1.0, 50: 1.0}, seed=100, lr=5e-4),  # of one tuning seed alone
    ]
    assert choose(runs, seeds=[100, 101], judged_by="tune", most=50) == Choice(1e-3, 25)
    assert choose(runs[2:4], seeds=[100, 101], judged_by="tune", most=50) == Choice(2e-3, 50)
    assert choose(runs[2:4], seeds=[100, 101], judged_by="tune", most=49) == Choice(2e-3, 25)
    assert choose(runs, seeds=[7], judged_by="tune", most=50) is None


def test_without_tuning_it_is_what_was_run() -> None:
    runs = [trial({0: 0.9, 60: 0.6}, seed=seed, lr=2e-3) for seed in (0, 1)]
    assert choose(runs, seeds=[], judged_by="tune", most=60) == Choice(2e-3, 60)
    assert choose(runs, seeds=[], judged_by="own", most=60) == Choice(2e-3, None)
    assert choose([], seeds=[], judged_by="tune", most=60) is None


def test_less_loss_is_better_and_ties_go_to_less() -> None:
    runs = [trial({25: 2.0, 50: 1.0, 75: 1.0}, lr=lr, metric="loss") for lr in (2e-3, 1e-3)]
    assert choose(runs, seeds=[0], judged_by="tune", most=75) == Choice(1e-3, 50)


def test_own_rows_choose_the_step_of_every_run() -> None:
    runs = [trial({25: 0.3, 50: 0.6, 75: 0.5}, seed=seed) for seed in (100, 0)]
    choice = choose(runs, seeds=[100], judged_by="own", most=75)
    assert choice == Choice(1e-3, None)
    assert step_of(runs[1], choice, judged_by="own", most=75) == 25
    assert step_of(runs[1], Choice(1e-3, 50), judged_by="tune", most=75) == 50


def test_equal_time_goes_along_the_baseline_s_own_curve() -> None:
    run = trial({0: 0.0, 50: 0.5, 100: 0.7})
    assert run.step_seconds == 2.0
    assert value_after(run, 75) == pytest.approx((0.7, True))
    assert after_equal_time(run, 50, 20.0) == pytest.approx((0.64, True))
    assert after_equal_time(run, 50, 1000.0) == pytest.approx((0.8, False))


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
def test_the_area_is_the_share_of_pairs(rows: list[tuple[int, bool]]) -> None:
    scores, good = np.array([s for s, _ in rows], dtype=float), np.array([g for _, g in rows])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[good] for b in scores[~good]]
    found = auc(scores, good)
    assert found is None if not pairs else found == pytest.approx(float(np.mean(pairs)))


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6))
def test_an_interval_is_within_the_values_and_around_most(values: list[float]) -> None:
    found = mean_of(values)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert found.value == pytest.approx(float(np.mean(values)))


def test_an_interval_of_a_large_sample_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = interval(values, lambda drawn: drawn.mean(axis=1))
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    assert all(math.isnan(end) for end in interval(values[:1], lambda drawn: drawn.mean(axis=1)))


def test_the_way_is_from_the_better_baseline() -> None:
    found = way([0.7, 0.8], [[0.5, 0.5], [0.6, 0.4]], [0.9, 0.9])
    assert found.value == pytest.approx((0.75 - 0.5) / 0.4)
    assert found.low <= found.value <= found.high
    assert math.isnan(way([0.7, 0.8], [[0.9, 0.9]], [0.9, 0.9]).value)


def test_failed_runs_and_half_a_line_are_not_read(tmp_path: Path) -> None:
    line = {"study": "query", "pool": "mixed", "seed": 0, "arm": "uniform", "lr": 0.001}
    whole = {"metric": "accuracy", "curve": {"25": {"tune": {"accuracy": 0.5}}}, "seconds": {}, "extra_seconds": 0.0}
    rest = {"rows": None, "share": None, "auc": None, "error": None, "device": "cpu"}
    failed = {**line, "seed": 1, "error": "UserError: no"}
    text = json.dumps({**line, **whole, **rest}) + "\n" + json.dumps(failed) + "\n" + '{"study": "qu'
    (tmp_path / "results.jsonl").write_text(text, encoding="utf-8")
    trials = read_trials(tmp_path / "results.jsonl")
    assert list(trials) == [TrialKey("query", "mixed", 0, "uniform", 0.001)]
    assert trials[TrialKey(**line)].curve == {25: {"tune": {"accuracy": 0.5}}}
    assert read_trials(tmp_path / "none.jsonl") == {}
