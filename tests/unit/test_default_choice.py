"""What a config chooses samples by where it does not say so."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.config_trees import tree as minimal
from tsqlora_scale.config.schema import Config


def chosen(**changes: Any) -> str:
    tree = {**minimal(), **changes}
    return Config.model_validate(tree).sampling.selector


def test_without_a_word_about_scores_draws_are_even() -> None:
    assert chosen() == "full"
    assert chosen(scoring={}, sampling={}) == "full"
    assert chosen(scoring={"max_length": None}) == "full"


@pytest.mark.parametrize(
    "changes", [{"scoring": {"preset": "paper"}}, {"scoring": {"batch_size": 4}}, {"sampling": {"tau": 0.5}}]
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


def test_a_query_is_chosen_by() -> None:
    tree = minimal()
    tree["task"] = {**tree["task"], "query": "query.jsonl"}
    assert Config.model_validate(tree).sampling.selector == "query"
    tree["scoring"] = {"batch_size": 4}
    assert Config.model_validate(tree).sampling.selector == "query"
