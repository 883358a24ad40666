"""A run whose texts are tokenized once trains as one that tokenizes them as it reads them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.disks import full
from tests.runs import go, losses_of, result_of, run_tree
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.run import preflight, token_keeping
from tsqlora_scale.tasks.objectives.causal import CausalObjective
from tsqlora_scale.tasks.tokens import token_cache, token_store


def tree(folder: Path, models: Path, name: str, cache: str, **scoring: Any) -> dict[str, Any]:
    found = run_tree("llama", folder, models, name, train={"eval_every": 5, "max_steps": 8}, scoring=scoring)
    found["task"] |= {"token_cache": cache, "metrics": ["loss"]}
    return found


def test_the_same_run(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = go(tree(tmp_path, models_dir, "off", "off", max_length=24)).record.folder
    read = []
    tokens = CausalObjective.tokens

    def counted(self: Any, rows: Any, max_length: int) -> Any:
        read.append(max_length)
        return tokens(self, rows, max_length)

    monkeypatch.setattr(CausalObjective, "tokens", counted)
    second = go(tree(tmp_path, models_dir, "on", str(tmp_path / "tokens"), max_length=24)).record.folder
    assert losses_of(first) == losses_of(second)
    assert result_of(first)["metrics"] == result_of(second)["metrics"]
    assert (first / "adapter" / "adapter_model.safetensors").read_bytes() == (
        second / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert len([path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]) == 3, "pool, shorter pool, dev set"
    assert read.count(24) < 48 / 8 + 3, "what is scored is made once, by blocks"
    monkeypatch.setattr(token_cache, "tokenized", None)  # what is there is not made again
    checked = preflight.check(
        parse_config(tree(tmp_path, models_dir, "again", str(tmp_path / "tokens"), max_length=24))
    )
    token_keeping.keep_tokens(checked)
    monkeypatch.setattr(CausalObjective, "tokens", None)
    checked.task.batch([3, 1])
    checked.task.batch([3, 1], max_length=24)
    checked.task.batch([3, 1], split="dev")


def test_a_disk_without_room(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(token_store, "fsync", full)
    with pytest.raises(UserError, match=r"task.token_cache=.* cannot be written"):
        go(tree(tmp_path, models_dir, "named", str(tmp_path / "tokens")))
    monkeypatch.setattr(token_keeping, "MUCH", 1)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        token_keeping.keep_tokens(preflight.check(parse_config(tree(tmp_path, models_dir, "auto", "auto"))))
    assert "texts are tokenized as they are read" in caplog.text


class Objective(CausalObjective):
    """One of somebody's own, which may read anything."""


def test_tokens_of_an_objective_of_ones_own_are_not_kept(tmp_path: Path, models_dir: Path) -> None:
    own = tree(tmp_path, models_dir, "own", str(tmp_path / "tokens"))
    own["task"]["objective"] = f"{__name__}:Objective"
    with pytest.raises(UserError, match=r"task.token_cache=.*: tokens of an objective of one's own.* set it to off"):
        token_keeping.keep_tokens(preflight.check(parse_config(own)))
    assert not (tmp_path / "tokens").exists()
