"""What a config chooses samples by where it does not say so."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.config_trees import tree as minimal
from tsqlora_scale.config.schema import Config, SamplingConfig, ScoringConfig


def chosen(**changes: Any) -> str:
    tree = {**minimal(), **changes}
    return Config.model_validate(tree).sampling.selector


def test_without_a_word_about_scores_draws_are_even() -> None:
    assert chosen() == "full"
    assert chosen(scoring={}, sampling={}) == "full"
    assert chosen(scoring={"max_samples": None}) == "full"
    assert chosen(scoring={"batch_size": 4, "folds": 5, "audit": "both"}, sampling={"replacement": False}) == "full"


@pytest.mark.parametrize(
    "changes", [{"scoring": {"preset": "paper"}}, {"scoring": {"warmup_steps": 4}}, {"sampling": {"tau": 0.7}}]
)
def test_who_says_how_to_score_or_draw_wants_scores(changes: dict[str, Any]) -> None:
    assert chosen(**changes) == "quality"
    plain = {"adapter": {"method": "lora"}}
    assert chosen(**plain, **changes) == "full", "but for a plain method"


def test_a_selector_that_is_named_wins() -> None:
    assert chosen(sampling={"selector": "full", "tau": 0.5}, scoring={"batch_size": 4}) == "full"
    assert chosen(sampling={"selector": "random", "keep_fraction": 0.5}) == "random"


def test_what_is_resolved_stays_what_it_is() -> None:
    for changes in ({}, {"scoring": {"preset": "paper"}}):
        config = Config.model_validate({**minimal(), **changes})
        again = Config.model_validate(config.model_dump(mode="json"))
        assert again.sampling.selector == config.sampling.selector
    even = Config.model_validate({**minimal(), "adapter": {"method": "lora"}}).model_dump(mode="json")
    for tree in (even, Config.model_validate(minimal()).model_dump(mode="json")):
        tree["adapter"] = {"method": "tsqlora"}
        del tree["sampling"]["selector"]
        assert Config.model_validate(tree).sampling.selector == "full", "what is spelled out says nothing new"


def test_sections_may_be_objects() -> None:
    assert chosen(sampling=SamplingConfig(tau=0.5)) == "quality"
    assert chosen(sampling=SamplingConfig(soft=False), scoring=ScoringConfig(folds=5)) == "full"
    assert chosen(sampling=SamplingConfig(selector="random")) == "random"
    tree = minimal()
    tree["task"] = {**tree["task"], "query": "query.jsonl"}
    found = Config.model_validate({**tree, "sampling": SamplingConfig(soft=False)}).sampling
    assert (found.selector, found.soft) == ("query", False)


def test_scores_that_0_1_has_switched_on_stay_on() -> None:
    assert chosen(scoring={"enabled": True}) == "quality"
    assert chosen(scoring={"enabled": True}, adapter={"method": "lora"}) == "full"


def test_a_query_is_chosen_by() -> None:
    tree = minimal()
    tree["task"] = {**tree["task"], "query": "query.jsonl"}
    assert Config.model_validate(tree).sampling.selector == "query"
    tree["scoring"] = {"batch_size": 4}
    assert Config.model_validate(tree).sampling.selector == "query"
