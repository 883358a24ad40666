"""Batches that are made ahead are those that would be made in time, and an order of length changes no loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.golden.making import timeless
from tests.runs import go, losses_of, read_lines, run_tree
from tests.steps import take_step
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.quality.selectors.full import FullSelector
from tsqlora_scale.run import next_batches, preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.next_batches import NextBatches
from tsqlora_scale.run.training_run import Run
from tsqlora_scale.step import longest_first
from tsqlora_scale.tasks import Task

OFF: dict[str, Any] = {"allocation": {"policy": "fixed"}, "sampling": {"selector": "full"}}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[NextBatches]:
    """What the runs that follow make their batches with."""
    made: list[NextBatches] = []
    enter = NextBatches.__enter__
    monkeypatch.setattr(NextBatches, "__enter__", lambda self: made.append(self) or enter(self))
    return made


def built(tree: dict[str, Any]) -> Run:
    return build_run(preflight.check(parse_config(tree)))


def test_nothing_depends_on_the_thread(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a pass, two refreshes and two rank events; only draws that scores have changed were guessed wrongly."""
    made = counted(monkeypatch)
    ahead = go(run_tree("bert", tmp_path, models_dir, "ahead")).record.folder
    assert made[0].hits == 13 - 1 - 3, "the first, and those after the three passes"
    monkeypatch.setattr(next_batches, "likely_rows", lambda *_: None)
    in_time = go(run_tree("bert", tmp_path, models_dir, "in-time")).record.folder
    assert made[1].hits == 0
    for name in ("metrics.jsonl", "ranks.jsonl"):
        assert timeless(ahead / name) == timeless(in_time / name)


def test_a_selector_whose_epochs_follow_the_losses(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = counted(monkeypatch)
    sections: dict[str, Any] = {**OFF, "sampling": {"selector": "infobatch", "keep_fraction": "auto"}}
    ahead = go(run_tree("bert", tmp_path, models_dir, "ahead", **sections))
    assert 0 < made[0].hits < 12
    monkeypatch.setattr(next_batches, "likely_rows", lambda *_: None)
    in_time = go(run_tree("bert", tmp_path, models_dir, "in-time", **sections))
    assert timeless(ahead.record.folder / "metrics.jsonl") == timeless(in_time.record.folder / "metrics.jsonl")


def test_a_selector_of_a_users_own_says_nothing_of_what_comes(tmp_path: Path, models_dir: Path) -> None:
    class Own(FullSelector):
        def draw(self, step: int) -> np.ndarray:
            return np.zeros(12, dtype=np.int64)

    run = built(run_tree("bert", tmp_path, models_dir, "run", **OFF))
    assert isinstance(run.selector, FullSelector)
    assert run.selector.draw_ahead(5) is not None
    assert Own(run.selector.context).draw_ahead(5) is None
    assert next_batches.likely_rows(run.task, 5) is None


def test_an_error_ahead_is_met_by_its_own_step(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = built(run_tree("bert", tmp_path, models_dir, "run", **OFF))
    with NextBatches(run, last=3) as nexts:
        nexts.take(0)
        nexts.settle()
        batch = Task.batch
        monkeypatch.setattr(Task, "batch", lambda *_, **__: 1 / 0)
        nexts.take(1)  # which is there
        nexts.settle()
        with pytest.raises(ZeroDivisionError):
            nexts.take(2)
        monkeypatch.setattr(Task, "batch", batch)
        assert nexts.take(2).batches[0].size == 6
        assert nexts.hits == 1 and nexts._future is None, "after the last step there is none"


def test_the_thread_tokenizes_during_steps_alone(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that two threads use at once fails."""
    run = built(run_tree("bert", tmp_path, models_dir, "run", **OFF))
    with NextBatches(run, last=13) as nexts:
        for step in range(3):
            nexts.take(step)
            nexts.settle()
            assert nexts._future is None and nexts._guess is not None


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40))
def test_the_longest_come_first(lengths: list[int]) -> None:
    """The same samples, never a longer one after a shorter; what is alike stays as it was drawn."""
    rows = np.arange(len(lengths)) + 100
    found = longest_first(rows, np.array(lengths))
    assert found.tolist() == sorted(rows.tolist(), key=lambda row: -lengths[row - 100])


@pytest.mark.parametrize("kind", ["bert", "bart", "llama"])
def test_an_order_of_length_changes_padding_and_not_the_loss(tmp_path: Path, models_dir: Path, kind: str) -> None:
    tree = run_tree(kind, tmp_path, models_dir, "drawn", train={"group_by_length": False}, **OFF)
    sorted_tree = run_tree(kind, tmp_path, models_dir, "sorted", **OFF)
    rows = [{"text": "good " * (1 + 7 * n % 24), "label": "yes", "summary": "fine"} for n in range(48)]
    (Path(tree["task"]["dataset"]["path"]) / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn, ordered = built(tree), built(sorted_tree)

    def tokens(run: Run) -> int:
        with NextBatches(run, last=1) as nexts:
            return sum(batch.inputs["input_ids"].numel() for batch in nexts.take(0).batches)

    assert tokens(ordered) < 0.9 * tokens(drawn)
    losses = [[take_step(run) for _ in range(3)] for run in (drawn, ordered)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    norms = [
        [line["grad_norm"] for line in read_lines(run.record.folder / "metrics.jsonl")] for run in (drawn, ordered)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_scores_and_weights_stay_with_their_samples(tmp_path: Path, models_dir: Path) -> None:
    """Weights of the losses, and what the steps say of samples, go by rows, in whatever order."""
    sections: dict[str, Any] = {
        "allocation": {"policy": "fixed"},
        "scoring": {"source": "online", "warmup_steps": 0, "refresh": "none"},
        "sampling": {"keep_fraction": 1.0},
        "train": {"max_steps": 4},
    }
    tables = []
    for name in (False, True):
        sections["train"] = {**sections["train"], "group_by_length": name}
        run = go(run_tree("bert", tmp_path, models_dir, f"run-{name}", **sections))
        assert run.selector.table is not None
        tables.append(run.selector.table.loss.copy())
        losses = losses_of(run.record.folder)
        assert len(losses) == 4
    np.testing.assert_allclose(tables[0], tables[1], rtol=1e-4, equal_nan=True)
