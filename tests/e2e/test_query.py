"""Runs with a query: every kind of task, selectors of all kinds, resuming to the bit, and what people are shown."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.queried import POOL, QUERY, queried
from tests.runs import TASKS, go, losses_of, read_lines, result_of, write_config
from tsqlora_scale.commands import main as cli
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.quality import ScoreTable
from tsqlora_scale.quality.features.forward_pass import ForwardPass
from tsqlora_scale.quality.query.mixture import Mixture
from tsqlora_scale.quality.query.query_rater import QueryRater
from tsqlora_scale.quality.selectors.ranked import RankedSelector
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run
from tsqlora_scale.run.training_run import Run


def as_numbers(tree: dict[str, Any]) -> dict[str, Any]:
    """A classification's run as a regression's: a yes is a 1."""
    for path in Path(tree["task"]["dataset"]["path"]).glob("*.jsonl"):
        rows = [row | {"label": float(row["label"] == "yes")} for row in read_lines(path)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree["task"] |= {"type": "regression", "metrics": ["mse"]}
    del tree["task"]["labels"]
    return tree


def table_of(run: Run) -> ScoreTable:
    assert run.selector.table is not None
    return run.selector.table


KINDS = ["bert", "regression", "llama", "bart"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_task(kind: str, tmp_path: Path, models_dir: Path) -> None:
    tree = queried("bert" if kind == "regression" else kind, tmp_path, models_dir, sampling={"keep_fraction": 0.5})
    run = go(as_numbers(tree) if kind == "regression" else tree)
    table, result = table_of(run), result_of(tmp_path / "runs" / "run")
    assert len(table) == POOL + QUERY
    assert table.selected.sum() == result["subset_size"] == 24 + QUERY
    assert table.selected[POOL:].all(), "the query's rows are always trained on"
    assert result["pool_size"] == POOL + QUERY
    assert np.isfinite(losses_of(tmp_path / "runs" / "run")).all()
    assert len(losses_of(tmp_path / "runs" / "run")) == 4
    findings = result["findings"]
    assert 0 <= findings["share on target"] <= findings["at most"] <= 1
    first = list(findings["coefficients"])
    second = [] if kind in ("llama", "bart") or not findings["evident"] else list(Mixture.names)
    assert list(table.terms) == first + second
    assert set(np.flatnonzero(run.seen)) <= set(np.flatnonzero(table.selected))
    written = pd.read_parquet(tmp_path / "runs" / "run" / "scores")
    assert written["sample_id"].tolist() == [*map(str, range(POOL)), *(f"query-{i}" for i in range(QUERY))]
    for name, values in table.terms.items():
        np.testing.assert_array_equal(written[name], values)
    if TASKS.get(kind) == "classification":
        in_balance(run, table)


def in_balance(run: Run, table: ScoreTable) -> None:
    """Of every stratum there are as many as the query has of it, but of those that have not as many, and then all."""
    ids, halves = run.task.class_ids(), 1
    assert ids is not None
    strata = ids
    if "pool_gain" in table.terms:
        strata, halves = 2 * ids + (table.terms["pool_gain"] > 0), 2
    shares = np.bincount(strata[POOL:], minlength=2 * halves) + 2 / halves
    chosen = np.bincount(strata[:POOL][table.selected[:POOL]], minlength=len(shares))
    rest = chosen < np.bincount(strata[:POOL], minlength=len(shares))
    left = table.selected[:POOL].sum() - chosen[~rest].sum()
    assert np.abs(chosen - left * shares / shares[rest].sum())[rest].max() < 1
    assert (chosen[~rest] <= left * shares[~rest] / shares[rest].sum() + 1).all()


def test_what_is_found_decides_how_many_are_kept(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = QueryRater.rate

    def found(share: float, evidence: float, *, looks: int = 1) -> int:
        def told(self: QueryRater, module: Any) -> Any:
            rating = rate(self, module)
            standing = replace(rating.standing, share=share, evidence=evidence, by_mixture=looks == 2)
            return replace(rating, standing=standing)

        monkeypatch.setattr(QueryRater, "rate", told)
        name = f"{share}-{evidence}-{looks}"
        run = build_run(preflight.check(parse_config(queried("bert", tmp_path, models_dir, name))))
        run.selector.score(run.engine.module, 0)
        return int(table_of(run).selected.sum())

    assert found(0.8, 9.0) == round(0.8 * (1 + 0.8**2) / 2 * POOL) + QUERY, "its surer part"
    assert found(0.5, 9.0, looks=2) == round(1.5 * 0.5 * POOL) + QUERY, "half as many again as a second look finds"
    assert found(0.8, 9.0, looks=2) == POOL + QUERY
    assert found(0.5, 2.9) == POOL + QUERY, "without evidence nothing is left out"
    assert found(0.01, 9.0) == QUERY + QUERY, "at least as many as the query has"


def test_a_topic_is_chosen_from_a_mixed_pool(tmp_path: Path, models_dir: Path) -> None:
    """A quarter of 160 rows is made as the query is."""
    tree = queried("bert", tmp_path, models_dir)
    rng = random.Random(0)
    data = Path(tree["task"]["dataset"]["path"])

    def row(words: list[str]) -> dict[str, str]:
        said = rng.choices(words, k=6)
        return {"text": " ".join([*said, rng.choice(["the", "a", "is"])]), "label": rng.choice(["yes", "no"])}

    wanted, others = ["film", "movie", "actor", "scene", "plot"], ["music", "script", "story", "ending", "director"]
    for name, rows in {
        "train.jsonl": [row(others if i % 4 else wanted) for i in range(160)],
        "query.jsonl": [row(wanted) for _ in range(24)],
    }.items():
        (data / name).write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    run = build_run(preflight.check(parse_config(tree)))
    run.selector.score(run.engine.module, 0)
    chosen = np.flatnonzero(table_of(run).selected[:160])
    assert (chosen % 4 == 0).mean() > 0.8
    assert isinstance(run.selector, RankedSelector)
    assert run.selector.findings["evident"]
    assert 0.1 < run.selector.findings["share on target"] < 0.45


@pytest.mark.parametrize("selector", ["full", "random", "quality"])
def test_other_selectors_train_on_the_query_too(selector: str, tmp_path: Path, models_dir: Path) -> None:
    sampling = {"selector": selector} | ({} if selector == "full" else {"keep_fraction": 0.25})
    tree = queried("bert", tmp_path, models_dir, sampling=sampling, scoring={"warmup_steps": 1, "refresh": "none"})
    run = build_run(preflight.check(parse_config(tree)))
    if selector == "quality":
        run.selector.score(run.engine.module, 1)
        chosen = table_of(run).selected
    else:
        chosen = np.zeros(POOL + QUERY, dtype=bool)
        chosen[run.selector.subset()] = True
    assert chosen[POOL:].all()
    assert chosen[:POOL].sum() == (POOL if selector == "full" else 12)
    assert run.plan.subset_size == chosen.sum()
    drawn = np.concatenate([run.selector.draw(step) for step in range(1, 30)])
    assert (drawn >= POOL).any()
    assert set(drawn.tolist()) <= set(np.flatnonzero(chosen).tolist())


@pytest.mark.parametrize("selector", ["full", "query"])
def test_a_query_that_is_only_chosen_by(selector: str, tmp_path: Path, models_dir: Path) -> None:
    tree = queried("bert", tmp_path, models_dir, sampling={"selector": selector})
    tree["task"]["train_on_query"] = False
    run = go(tree)
    assert len(run.task) == len(run.seen) == result_of(tmp_path / "runs" / "run")["pool_size"] == POOL
    if selector == "query":
        assert len(table_of(run)) == POOL


def test_a_query_is_chosen_by_unless_the_config_says_otherwise(tmp_path: Path, models_dir: Path) -> None:
    tree = queried("bert", tmp_path, models_dir)
    del tree["sampling"]
    assert parse_config(tree).sampling.selector == "query"
    tree["adapter"]["method"] = "lora"
    assert parse_config(tree).sampling.selector == "full"
    del tree["adapter"]["method"], tree["task"]["query"]
    assert parse_config(tree).sampling.selector == "quality"


@pytest.mark.parametrize("type_", ["dora", "rslora"])
def test_other_adapters_choose_alike(type_: str, tmp_path: Path, models_dir: Path) -> None:
    """The base decides, and it is the same."""
    chosen = []
    for name, adapter in (("lora", {}), (type_, {"method": None, "type": type_})):
        run = build_run(preflight.check(parse_config(queried("bert", tmp_path, models_dir, name, adapter=adapter))))
        run.selector.score(run.engine.module, 0)
        chosen.append(table_of(run))
    np.testing.assert_allclose(chosen[0].quality, chosen[1].quality, atol=1e-6)
    np.testing.assert_array_equal(chosen[0].selected, chosen[1].selected)


def test_a_packed_base(tmp_path: Path, models_dir: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tree = queried("llama", tmp_path, models_dir, sampling={"keep_fraction": 0.5}, train={"max_steps": 2})
    tree["model"]["quantization"] = "nf4"
    run = go(tree)
    assert table_of(run).selected.sum() == 24 + QUERY
    assert np.isfinite(losses_of(tmp_path / "runs" / "run")).all()


LONG = {"train": {"max_steps": 8, "checkpoint_every": 3, "checkpoint_keep": 9}, "sampling": {"keep_fraction": 0.5}}


def test_resuming_to_the_bit(tmp_path: Path, models_dir: Path) -> None:
    """After the choice, from another folder; nothing is looked at again."""
    whole = go(queried("bert", tmp_path, models_dir, "whole", **LONG))
    checkpoint = tmp_path / "runs" / "whole" / "checkpoints" / "step-00000003"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ForwardPass, "run", None)
        again = go(queried("bert", tmp_path, models_dir, "again", **LONG), resume=str(checkpoint))
    assert losses_of(tmp_path / "runs" / "again") == losses_of(tmp_path / "runs" / "whole")[3:]
    np.testing.assert_array_equal(table_of(again).quality, table_of(whole).quality)
    for name in ("findings", "metrics", "subset_size"):
        assert result_of(tmp_path / "runs" / "again")[name] == result_of(tmp_path / "runs" / "whole")[name]
    for trained, word in ((True, "other training data"), (False, "task.query")):
        name = f"trained-{trained}"
        tree = queried("bert", tmp_path, models_dir, name, **LONG)
        tree["task"]["train_on_query"] = trained
        if not trained:
            go(tree)
            checkpoint = tmp_path / "runs" / name / "checkpoints" / "step-00000003"
        other = queried("bert", tmp_path, models_dir, f"{name}-other", seed=6, **LONG)
        other["task"]["train_on_query"] = trained
        with pytest.raises(UserError, match=word):
            go(other, resume=str(checkpoint))


class Killed(Exception):
    """A kill in the middle of a pass."""


def test_a_killed_pass_goes_on(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scoring = {"shard_size": 16, "batch_size": 4}
    wanted = go(queried("bert", tmp_path, models_dir, "whole", scoring=scoring))
    assert set(Mixture.names) <= set(table_of(wanted).terms), "by both looks"
    shard, looked = ForwardPass._shard, []

    def counted(self: ForwardPass, *arguments: Any, **given: Any) -> np.ndarray:
        looked.append(1)
        if len(looked) == 3:
            raise Killed
        return shard(self, *arguments, **given)

    monkeypatch.setattr(ForwardPass, "_shard", counted)
    tree = queried("bert", tmp_path, models_dir, "killed", scoring=scoring)
    with pytest.raises(Killed):
        go(tree)
    assert list((tmp_path / "runs" / "killed" / "score-parts").rglob("*.npy"))
    run = go(tree, resume="auto")
    assert len(looked) == 3 + 2, "four shards, of which two were kept"
    np.testing.assert_array_equal(table_of(run).quality, table_of(wanted).quality)
    assert losses_of(tmp_path / "runs" / "killed") == losses_of(tmp_path / "runs" / "whole")
    assert not list((tmp_path / "runs" / "killed").rglob("*.npy"))


def test_a_dry_run_says_what_will_be(tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "config.yaml", queried("bert", tmp_path, models_dir))
    assert cli.main(["train", "--config", str(config), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "pool: 60 samples, 12 of them the query's, trained on: as many as are found to be wanted, at most 60" in out
    assert "scoring: before the first step" in out
    assert cli.main(["train", "--config", str(config), "--dry-run", "sampling.keep_fraction=0.5"]) == 0
    assert "pool: 60 samples, 12 of them the query's, trained on: 36\n" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_the_commands(tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run says what it has found; its adapter is evaluated and answers without the query's file."""
    tree = queried("bert", tmp_path, models_dir)
    config = write_config(tmp_path / "config.yaml", tree)
    assert cli.main(["train", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    for word in ("share on target", "at most", "coefficients", "text_term", "evident"):
        assert word in out
    data = Path(tree["task"]["dataset"]["path"])
    (data / "query.jsonl").unlink()
    run = tmp_path / "runs" / "run"
    assert cli.main(["evaluate", "--config", str(config), "--adapter", str(run)]) == 0
    assert "accuracy: " in capsys.readouterr().out
    answers = tmp_path / "answers.jsonl"
    assert cli.main(["predict", "--run", str(run), "--data", str(data / "dev.jsonl"), "--out", str(answers)]) == 0
    assert len(read_lines(answers)) == 8
    assert cli.main(["train", "--config", str(config), "--overwrite"]) == 2
    assert "task.query" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_pool_is_rated_alone(kind: str, tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = queried(kind, tmp_path, models_dir, scoring={"shard_size": 20})
    config = write_config(tmp_path / "config.yaml", tree)
    assert cli.main(["score", "--config", str(config), "--top", "4"]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "runs" / "run"
    table, ids = ScoreTable.read(folder / "scores")
    summary = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    for word in ("60 of 60 samples scored, 0 steps in", "share on target", "kept:", "text_term", "best", "worst"):
        assert word in out
    assert "most against the others" not in out
    written = pd.read_parquet(folder / "scores")
    assert summary["kept"] == table.selected.sum() == written["selected"].sum()
    assert "text" in written, "with the samples' texts"
    best = [entry["sample_id"] for entry in summary["best"]]
    assert not any(name.startswith("query-") for name in best), "these are known"
    if kind == "llama":
        assert best == [ids[i] for i in np.argsort(-table.quality[:POOL], kind="stable")[:4]]
    for term, quantiles in summary["distribution"].items():
        np.testing.assert_allclose(quantiles[-1], written[term][:POOL].max())
    assert not (folder / "adapter").exists()
    assert not (folder / "score-parts").exists()
    before = written["quality"]
    assert cli.main(["score", "--config", str(config)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["score", "--config", str(config), "--resume"]) == 0
    np.testing.assert_array_equal(pd.read_parquet(folder / "scores")["quality"], before)
    capsys.readouterr()
    assert cli.main(["score", "--config", str(config), "--overwrite", "--adapter", str(folder)]) == 2
    assert "--adapter" in capsys.readouterr().err
