"""What follows from what was seen: every branch, and what must hold whatever was seen."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.mixed import mixed_tree
from tests.runs import run_tree
from tsqlora_scale.advice.advised_config import config_lines, loses_held_out
from tsqlora_scale.advice.paired import Difference, Gain
from tsqlora_scale.advice.pool_shares import PoolShare
from tsqlora_scale.advice.verdict import Trials, Verdict, decide
from tsqlora_scale.config.load import parse_config

UP, DOWN = Gain(Difference(0.2, 0.1, 0.3)), Gain(Difference(-0.2, -0.3, -0.1))
RATHER_UP, RATHER_DOWN = Gain(Difference(0.05, -0.1, 0.2)), Gain(Difference(-0.05, -0.2, 0.1))


def way(evidence: float | None, gain: Gain, alone: Gain, over_alone: Gain) -> str:
    evident = evidence is not None and evidence > 3
    return decide(evidence=evidence, is_evident=evident, trials=Trials(gain, alone, over_alone)).way


@pytest.mark.parametrize(
    ("evidence", "gain", "alone", "over_alone", "expected"),
    [
        (10.0, UP, RATHER_UP, UP, "query"),
        (10.0, UP, UP, RATHER_DOWN, "query"),
        (10.0, UP, UP, DOWN, "query alone"),
        (10.0, RATHER_UP, RATHER_UP, RATHER_UP, "query"),
        (10.0, RATHER_DOWN, RATHER_UP, RATHER_UP, "even"),
        (10.0, DOWN, UP, DOWN, "query alone"),
        (10.0, DOWN, DOWN, DOWN, "even"),
        (4.0, RATHER_UP, RATHER_UP, RATHER_UP, "even"),
        (4.0, UP, RATHER_UP, RATHER_UP, "query"),
        (4.0, RATHER_UP, UP, RATHER_DOWN, "query"),
        (4.0, RATHER_UP, UP, DOWN, "query alone"),
        (4.0, RATHER_DOWN, UP, RATHER_DOWN, "even"),
        (1.0, UP, RATHER_UP, UP, "even"),
        (1.0, RATHER_UP, UP, RATHER_UP, "query alone"),
    ],
)
def test_a_query(evidence: float, gain: Gain, alone: Gain, over_alone: Gain, expected: str) -> None:
    assert way(evidence, gain, alone, over_alone) == expected


@pytest.mark.parametrize(
    ("evidence", "joined", "expected"),
    [
        (1.0, RATHER_UP, False),
        (1.0, UP, True),
        (1.0, DOWN, False),
        (4.0, RATHER_DOWN, True),
        (4.0, RATHER_UP, True),
        (4.0, DOWN, False),
    ],
)
def test_even_draws_are_of_the_query_where_that_may_help(evidence: float, joined: Gain, expected: bool) -> None:
    trials = Trials(RATHER_DOWN, RATHER_DOWN, RATHER_UP, joined)
    found = decide(evidence=evidence, is_evident=evidence > 3, trials=trials)
    assert (found.way, found.joins_query) == ("even", expected)
    assert "beside the pool" in found.reasons[-1]
    left_out = decide(evidence=evidence, is_evident=evidence > 3, trials=trials, joins_query=False)
    assert (left_out.way, left_out.joins_query, left_out.reasons) == ("even", False, found.reasons[:-1])


def test_a_choice_is_beside_the_query() -> None:
    assert decide(evidence=10.0, is_evident=True, trials=Trials(UP, RATHER_UP, UP, DOWN)).joins_query


@pytest.mark.parametrize(("trials", "way"), [
    (Trials(UP, RATHER_UP, UP, DOWN, RATHER_DOWN, RATHER_DOWN), "query"),
    (Trials(UP, RATHER_UP, UP, DOWN, DOWN, RATHER_DOWN), "even"),
    (Trials(DOWN, UP, DOWN, DOWN, DOWN, RATHER_DOWN), "query alone"),
    (Trials(DOWN, UP, DOWN, DOWN, DOWN, DOWN), "even"),
    (Trials(RATHER_UP, RATHER_DOWN, UP, RATHER_DOWN, DOWN, DOWN), "even"),
])  # fmt: skip
def test_nothing_is_advised_that_the_pool_alone_beats(trials: Trials, way: str) -> None:
    found = decide(evidence=10.0, is_evident=True, trials=trials)
    assert (found.way, found.joins_query) == (way, way != "even")
    assert ("+0.200 nats a row (+0.100 to +0.300)" in found.reasons[2]) if way == "even" else True


def test_without_a_query_there_is_nothing_to_choose_by() -> None:
    found = decide(evidence=None, wrong=PoolShare(0.3, 0.2, 0.4), redundant=PoolShare(0.1, 0.1, 0.1))
    assert found.way == "even"
    assert "no task.query" in found.reasons[0]
    assert "30% of the labels" in found.reasons[1] and "--audit" in found.reasons[1]
    assert "10% of the rows" in found.reasons[2]


@pytest.mark.parametrize(
    "wrong", [None, PoolShare(0.05, 0.0, 0.2), PoolShare(0.3, 0.2, 0.4, "this says little")]
)  # fmt: skip
def test_labels_that_may_all_be_right_are_not_spoken_of(wrong: PoolShare | None) -> None:
    assert len(decide(evidence=None, wrong=wrong).reasons) == 1


@pytest.mark.parametrize(("evidence", "expected"), [(2.0, "even"), (4.0, "even"), (9.0, "query")])
def test_texts_without_a_trial(evidence: float, expected: str) -> None:
    found = decide(evidence=evidence, is_evident=evidence > 3)
    assert found.way == expected
    assert found.joins_query == (evidence > 3)
    assert "--pilot adapters" in found.reasons[0]


def gains() -> st.SearchStrategy[Gain]:
    ends = st.lists(st.floats(-1, 1), min_size=3, max_size=3).map(sorted)
    return ends.map(lambda three: Gain(Difference(three[1], three[0], three[2])))


@given(st.floats(-3, 20), gains(), gains(), gains())
def test_nothing_is_chosen_against_the_evidence(evidence: float, gain: Gain, alone: Gain, over_alone: Gain) -> None:
    chosen = way(evidence, gain, alone, over_alone)
    if chosen == "query":
        assert evidence > 3 and gain.nats.mean >= 0 and not gain.is_below
    if chosen == "query alone":
        assert alone.is_above


CASES: list[tuple[dict[str, dict[str, Any]], str]] = [
    ({}, "query"),
    ({}, "query alone"),
    ({}, "even"),
    ({"train": {"epochs": 3, "max_steps": None}, "sampling": {"selector": "full"}}, "query"),
    ({"sampling": {"selector": "file", "file": "scores.csv", "keep_fraction": 0.5}}, "even"),
    ({"sampling": {"selector": "file", "file": "scores.csv", "keep_fraction": 0.5}}, "query"),
    ({"sampling": {"selector": "file", "file": "scores.csv", "keep_fraction": 0.5}}, "query alone"),
    ({"sampling": {"selector": "dsir", "keep_fraction": 0.5}}, "query alone"),
    ({"train": {"epochs": 3, "max_steps": None}}, "query alone"),
    ({"task": {"labels": None}}, "query alone"),
]


@pytest.mark.parametrize(("sections", "way"), CASES)
def test_the_lines_are_a_config(sections: dict[str, dict[str, Any]], way: str, tmp_path: Any, models_dir: Any) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "run", **sections)
    tree["task"]["query"] = "query.jsonl"
    tree["task"]["dataset"] |= {"weight": "w", "max_train_samples": 20}
    asked = parse_config(tree)
    lines = config_lines(asked, Verdict(way, (), joins_query=way != "even"), steps=77, labels=["no", "yes"])
    for section, values in lines.items():
        dataset = values.pop("dataset", {})
        tree[section] |= values
        if dataset:
            tree[section]["dataset"] |= dataset
    config = parse_config(tree)
    assert config.sampling.selector == ("query" if way == "query" else "full")
    assert config.task.train_on_query == (way != "even")
    if way == "query alone":
        assert config.task.dataset.train_file == "query.jsonl"
        assert config.task.query is config.task.dataset.weight is config.task.dataset.max_train_samples is None
        assert config.task.labels == ["no", "yes"]
    if way != "even" and asked.train.epochs is not None:
        assert (config.train.max_steps, config.train.epochs) == (77, None)


@pytest.mark.parametrize("source", ["hub", "mixture"])
def test_held_out_rows_that_go_with_the_pool(source: str, tmp_path: Any, models_dir: Any) -> None:
    """What needs them is taken out of the config, and they are said to be lost."""
    tree = run_tree("bert", tmp_path, models_dir, "run", train={"eval_every": 5, "keep": "best", "patience": 2})
    tree["task"] |= {"query": "query.jsonl"}
    if source == "hub":
        tree["task"]["dataset"] = {"name": "glue", "subset": "sst2"}
    else:
        files = tree["task"].pop("dataset")
        tree["task"] |= {"mixture": [{"name": "a", "dataset": files}, {"name": "b", "dataset": files}]}
    config = parse_config(tree)
    assert loses_held_out(config)
    lines = config_lines(config, Verdict("query alone", ()), steps=77)
    assert lines["train"] == {"eval_every": None, "patience": None, "keep": "last"}
    dataset = lines["task"].pop("dataset")
    tree["task"] |= lines["task"] | {"dataset": tree["task"].get("dataset", {}) | dataset}
    tree["train"] |= lines["train"]
    assert not parse_config(tree).task.has_dev


def test_columns_that_the_sets_alone_name(tmp_path: Any, models_dir: Any) -> None:
    tree = mixed_tree(tmp_path, models_dir, "run", selector="query")
    tree["task"] |= {"query": str(tmp_path / "few.jsonl")}
    lines = config_lines(parse_config(tree), Verdict("query alone", ()), steps=77, labels=["no", "yes"])
    for section, values in lines.items():
        tree[section] = tree.get(section, {}) | values
    config = parse_config(tree)
    assert (config.task.text, config.task.label, config.task.mixture) == (["text"], "label", [])
    assert config.task.dataset.train_file == str(tmp_path / "few.jsonl")


def test_snapshots_that_followed_the_evaluations(tmp_path: Any, models_dir: Any) -> None:
    train = {"eval_every": 5, "average_last": 2, "keep": "average"}
    tree = run_tree("bert", tmp_path, models_dir, "run", train=train)
    tree["task"] |= {"query": "query.jsonl", "dataset": {"name": "glue", "subset": "sst2"}}
    lines = config_lines(parse_config(tree), Verdict("query alone", ()), steps=77)
    assert lines["train"] == {"eval_every": None, "average_every": 5}
    tree["task"]["dataset"] |= lines["task"].pop("dataset")
    tree["task"] |= lines["task"]
    tree["train"] |= lines["train"]
    assert parse_config(tree).train.average_every == 5
