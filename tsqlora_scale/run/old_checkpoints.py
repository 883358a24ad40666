"""Checkpoints of earlier versions: of release 0.1, whose selector and rank controller were parts of the run, and those
whose configs lack keys that have come since."""

from __future__ import annotations

from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config


def _with_new_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A written config with today's keys at their defaults; as it is where it means nothing today."""
    try:
        return parse_config(config).model_dump(mode="json")
    except UserError:
        return config


def of_today(tree: dict[str, Any]) -> dict[str, Any]:
    """The state of a run in today's form; one that has it already as it is."""
    if "selector" in tree:
        return {**tree, "config": _with_new_keys(tree["config"])}
    config = parse_config(tree["config"], "the checkpoint's config")
    scorer, sampler = tree["scorer"], tree["sampler"]
    selector: dict[str, Any] = {"sampler": sampler}
    if scorer is not None:
        # scores were refreshed right after an event, so before any checkpoint of its step
        selector |= {"scorer": scorer, "scored_at": None if scorer["table"] is None else tree["step"]}
    ranks = {} if tree["tracker"] is None else {"tracker": tree["tracker"], "first_quality": tree["first_quality"]}
    return {
        **{key: value for key, value in tree.items() if key not in ("scorer", "sampler", "tracker", "first_quality")},
        "selector": selector,
        "controller": ranks,
        "config": config.model_dump(mode="json"),
    }
