"""Arms see what they may see: files, lists of rows left out, labels and weights from an audit; late weights."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.studies.arms import ARMS, Site, Unavailable, lacks
from benchmarks.studies.late_weights import LateWeights
from benchmarks.studies.plans import STUDIES
from benchmarks.studies.pools import Maker, read_rows, write_pool
from benchmarks.studies.trial import judged_audit, judged_choice
from benchmarks.studies.visited_losses import SmallLosses, small
from tests.unit.config_trees import tree
from tests.unit.quality.toys import RandomPool
from tests.unit.studies.small_data import write_small_data
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality.scores.score_table import ScoreTable
from tsqlora_scale.quality.selectors.selector import SelectorContext


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pools")
    maker = Maker(write_small_data(folder / "data"), 0, 0.02)
    for name in ("mixed", "flips"):
        write_pool(folder / name, maker.make(name), 0)
    truth = read_rows(folder / "flips" / "truth.jsonl")
    labels = {row["id"]: row["label"] for row in read_rows(folder / "flips" / "train.jsonl")}
    with (folder / "flips" / "audit.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sample_id", "probability_wrong", "suggested_label", "agree"])
        for place, row in enumerate(truth):  # all that are wrong are suspected; of the last the folds do not agree
            agree = place < len(truth) - 1
            writer.writerow([row["id"], 0.9 if row["wrong"] else 0.2, 1 - labels[row["id"]], agree])
    (folder / "flips" / "audit_seconds.txt").write_text("3.5\n", encoding="utf-8")
    return folder


def site(pools: Path, name: str, work: Path, size: int | None = None) -> Site:
    meta = json.loads((pools / name / "meta.json").read_text(encoding="utf-8"))
    return Site(pools / name, work, meta, seed=0, size=size)


def prepared(arm: str, where: Site) -> dict[str, str]:
    return dict(override.split("=", 1) for override in ARMS[arm].prepare(where))


def left_out(overrides: dict[str, str]) -> set[str]:
    return set(Path(overrides["task.dataset.exclude"]).read_text(encoding="utf-8").split())


def test_the_oracle_has_the_rows_on_target_and_the_query(pools: Path, tmp_path: Path) -> None:
    found = prepared("oracle+q", site(pools, "mixed", tmp_path))
    truth = read_rows(pools / "mixed" / "truth.jsonl")
    assert left_out(found) == {row["id"] for row in truth if not row["on_target"]}
    assert found["task.dataset.train_file"].endswith("mixed/query.jsonl]")
    assert prepared("oracle+q", site(pools, "flips", tmp_path)).keys() == {"task.dataset.train_file"}


def test_random_rows_are_as_many_as_ours(pools: Path, tmp_path: Path) -> None:
    found = prepared("random+q", site(pools, "mixed", tmp_path, size=6))
    assert len(left_out(found)) == 40 - 6
    assert found == prepared("random+q", site(pools, "mixed", tmp_path, size=6))
    with pytest.raises(Unavailable):
        prepared("random+q", site(pools, "mixed", tmp_path))


def test_what_an_audit_is_used_for(pools: Path, tmp_path: Path) -> None:
    where = site(pools, "flips", tmp_path)
    truth = read_rows(pools / "flips" / "truth.jsonl")
    labels = [row["label"] for row in read_rows(pools / "flips" / "train.jsonl")]
    wrong = [row["wrong"] for row in truth]
    assert left_out(prepared("drop", where)) == {row["id"] for row in truth if row["wrong"]}
    assert left_out(prepared("oracle", where)) == {row["id"] for row in truth if row["wrong"]}
    prepared("weigh", where)
    weights = [row["weight"] for row in read_rows(tmp_path / "train.jsonl")]
    assert weights == pytest.approx([0.1 if bad else 0.8 for bad in wrong])
    prepared("soften", where)
    rows = read_rows(tmp_path / "train.jsonl")
    assert [row["label"] for row in rows] == [y for given in labels for y in (given, 1 - given)]
    assert [row["weight"] for row in rows[::2]] == pytest.approx(weights)
    assert [row["weight"] + other["weight"] for row, other in zip(rows[::2], rows[1::2], strict=True)] == [1.0] * 20
    prepared("correct", where)
    corrected = [row["label"] for row in read_rows(tmp_path / "train.jsonl")]
    assert corrected[:-1] == [1 - y if bad else y for y, bad in zip(labels, wrong, strict=True)][:-1]
    assert corrected[-1] == labels[-1]
    prepared("oracle, put right", where)
    right = [row["label"] for row in read_rows(tmp_path / "train.jsonl")]
    assert right == [1 - y if bad else y for y, bad in zip(labels, wrong, strict=True)]
    assert judged_audit(pools / "flips") == {"rows": 14, "share": 1.0, "drawn_share": 1.0, "auc": 1.0}
    with pytest.raises(Unavailable):
        prepared("drop", site(pools, "mixed", tmp_path))


def test_own_rows_are_held_out(pools: Path, tmp_path: Path) -> None:
    found = prepared("own stop", site(pools, "flips", tmp_path))
    held_out = read_rows(Path(found["task.dataset.dev_file.own"]))
    rest = read_rows(tmp_path / "train.jsonl")
    assert (len(held_out), len(rest)) == (4, 16)
    assert {row["id"] for row in [*held_out, *rest]} == {
        row["id"] for row in read_rows(pools / "flips" / "train.jsonl")
    }


def test_what_a_pool_lacks(pools: Path) -> None:
    assert lacks(ARMS["query"], pools / "mixed") is None
    assert lacks(ARMS["oracle"], pools / "mixed") == "wrong"
    assert lacks(ARMS["drop"], pools / "mixed") == "audit"
    assert lacks(ARMS["drop"], pools / "flips") is None


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_a_study_names_arms_that_there_are(study: Any) -> None:
    assert {*study.arms, *study.baselines, study.oracle or "uniform"} <= set(ARMS)
    assert all(ARMS[name].is_baseline for name in study.baselines if name in ("uniform", "uniform+q", "query"))


def test_a_choice_is_judged_by_what_is_on_target(pools: Path, tmp_path: Path) -> None:
    truth = read_rows(pools / "mixed" / "truth.jsonl")
    ids = [row["id"] for row in truth] + ["query-q0"]
    good = np.array([row["on_target"] for row in truth] + [True])
    table = ScoreTable.empty(len(ids))
    table.quality[:] = good
    table.probability[:] = np.where(good, 3.0, 1.0)
    table.selected[:] = True
    table.write(tmp_path / "scores", ids)
    found = judged_choice(tmp_path / "scores", pools / "mixed" / "truth.jsonl")
    assert (found["rows"], found["auc"]) == (40, 1.0)
    assert found["share"] == pytest.approx(6 / 40)
    assert found["drawn_share"] == pytest.approx(18 / (18 + 34))
    assert judged_choice(tmp_path / "none", pools / "mixed" / "truth.jsonl")["auc"] is None


class HalfForgotten(RandomPool):
    weights = np.array([1.0, 1e-9] * 4)

    def draw_weights(self) -> np.ndarray:
        return self.weights


def late(weights: np.ndarray) -> LateWeights:
    pool = HalfForgotten("bert", 8)
    pool.weights = weights
    config = parse_config(tree(train={"max_steps": 20, "batch_size": 8}))
    return LateWeights(
        SelectorContext(config=config, pool=pool, theta=lambda *_: {}, world=World.current(), scoring_step=2)
    )


def drawn(selector: LateWeights, steps: range) -> np.ndarray:
    return np.concatenate([selector.draw(step) for step in steps])


def test_weights_count_late() -> None:
    selector = late(np.array([1.0, 1e-9] * 4))
    assert [selector.due(step) for step in (0, 1, 2)] == [False, False, True]
    assert sorted(drawn(selector, range(1))) == list(range(8))
    selector.score(None, 2)  # type: ignore[arg-type]
    assert not selector.due(3)
    assert np.bincount(drawn(selector, range(2, 4)), minlength=8).tolist() == [4, 0] * 4
    resumed = late(np.array([1.0, 1e-9] * 4))
    resumed.load_state_dict(selector.state_dict())
    assert drawn(resumed, range(2, 8)).tolist() == drawn(selector, range(2, 8)).tolist()


def test_late_weights_of_several_sizes() -> None:
    selector = late(np.array([8.0, 1.0] * 4))
    assert sorted(drawn(selector, range(1))) == list(range(8))
    selector.score(None, 2)  # type: ignore[arg-type]
    counts = np.bincount(drawn(selector, range(2, 402)), minlength=8)
    assert counts[::2].sum() / counts.sum() == pytest.approx(8 / 9, abs=0.03)


def by_visits() -> SmallLosses:
    config = parse_config(tree(train={"max_steps": 20, "batch_size": 5}))
    pool = RandomPool("bert", 10)
    pool.labels = np.arange(10) % 2
    return SmallLosses(
        SelectorContext(config=config, pool=pool, theta=lambda *_: {}, world=World.current(), scoring_step=3)
    )


def visit(selector: SmallLosses, step: int, losses: np.ndarray) -> np.ndarray:
    """A step in which every row costs its loss."""
    rows, heard = selector.draw(step), selector.listener
    heard.start_step(step, len(rows))
    heard.start_micro_batch(len(rows), 0)
    numbers = torch.from_numpy(losses[rows])
    heard.end_micro_batch(numbers, torch.ones(len(rows)))
    heard.take(rows, heard.numbers(numbers), taken=True)
    return rows


def test_what_costs_most_over_all_visits_is_left_out_late() -> None:
    """Of ten rows in two classes the costliest of each, by the mean: the last visit alone would name others."""
    selector, losses = by_visits(), np.arange(10.0)
    seen = [visit(selector, step, losses) for step in range(2)]
    assert sorted(np.concatenate(seen)) == list(range(10))
    again = visit(selector, 2, np.full(10, 20.0))
    means = np.where(np.isin(np.arange(10), again), (losses + 20) / 2, losses)
    assert [selector.due(step) for step in (2, 3)] == [False, True]
    selector.score(None, 3)  # type: ignore[arg-type]
    assert not selector.due(4)
    kept = small(means, np.arange(10) % 2)
    assert kept.sum() == 8
    drawn_rows = np.concatenate([selector.draw(step) for step in range(3, 11)])
    assert set(drawn_rows) == set(np.flatnonzero(kept))
    resumed = by_visits()
    resumed.load_state_dict(selector.state_dict())
    assert np.concatenate([resumed.draw(step) for step in range(3, 11)]).tolist() == drawn_rows.tolist()


def test_small_losses_by_hand() -> None:
    losses = np.array([1.0, 5.0, np.nan, 2.0, 3.0, 9.0, 8.0, 7.0, 6.0, np.nan])
    kept = small(losses, np.array([0] * 5 + [1] * 5))
    assert np.flatnonzero(~kept).tolist() == [1, 5]
    assert small(np.array([np.nan] * 9 + [1.0]), np.zeros(10, dtype=int)).tolist() == [True] * 9 + [False]
