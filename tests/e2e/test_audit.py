"""``launch/score.py --audit``: planted mistakes are found, and what it writes is taken back."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.runs import go, read_lines, run_tree, write_config
from tests.tiny import WORDS
from tsqlora_scale.api import audit
from tsqlora_scale.audit import cross_fit, passes
from tsqlora_scale.commands import main as cli
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.quality.features.forward_pass import ForwardPass

FIELDS = {"film": ["film", "movie", "actor"], "sound": ["music", "with", "of"], "text": ["script", "story", "plot"]}
PLAIN: dict[str, Any] = {"allocation": {"policy": "fixed"}, "sampling": {"selector": "full", "keep_fraction": 1.0}}


def plant(folder: Path, size: int = 240) -> set[int]:
    """A pool of three clear classes, a tenth of whose labels are wrong, and two copies; the wrong ones."""
    names, rng = list(FIELDS), random.Random(3)
    rows, wrong = [], set()
    for i in range(size):
        truth = names[i % 3]
        label = truth if i % 10 else rng.choice([n for n in names if n != truth])
        wrong |= {i} if label != truth else set()
        rows.append({"text": " ".join(rng.choices(FIELDS[truth], k=5) + rng.choices(WORDS[:9], k=3)), "label": label})
    rows[7] = dict(rows[4])
    rows[8] = {"text": rows[5]["text"].upper(), "label": rows[5]["label"]}
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]), encoding="utf-8")
    return wrong - {7, 8}


def planted(tmp_path: Path, models_dir: Path, name: str, **sections: Any) -> tuple[dict[str, Any], set[int]]:
    tree = run_tree("bert", tmp_path, models_dir, name, **sections)
    wrong = plant(tmp_path / "data-classification")
    tree["task"]["labels"] = list(FIELDS)
    tree["train"] |= {"max_steps": 24, "batch_size": 16, "micro_batch_size": 16}
    return tree, wrong


def test_mistakes_are_found_and_taken_out(tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree, wrong = planted(tmp_path, models_dir, "audited")
    config = write_config(tmp_path / "config.yaml", tree)
    assert cli.main(["score", "--audit", "--config", str(config), "--top", "3"]) == 0
    out = capsys.readouterr().out
    for word in ("of 240 labels are wrong", "most suspect", "by label", "page: ", "fixes: "):
        assert word in out
    folder = tmp_path / "runs" / "audited" / "audit"
    assert sorted(path.name for path in folder.iterdir()) == [
        "audit.csv", "audit.parquet", "fixes.csv", "index.html", "summary.json",
    ]  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    low, high = summary["between"]
    assert low - 0.02 <= len(wrong) / 240 <= high + 0.02
    with (folder / "fixes.csv").open(encoding="utf-8", newline="") as file:
        fixes = list(csv.DictReader(file))
    listed = {int(row["id"]) for row in fixes if "probably wrong" in row["reason"]}
    assert len(listed & wrong) >= 0.8 * len(wrong)
    assert len(listed - wrong) <= 0.2 * len(wrong)
    rows = read_lines(tmp_path / "data-classification" / "train.jsonl")
    assert all(row["label"] == rows[int(row["id"])]["label"] != row["suggested_label"] for row in fixes if row["suggested_label"])  # noqa: E501  # fmt: skip
    copies = {row["id"]: row["reason"] for row in fixes if row["reason"].startswith("copy")}
    assert copies.keys() & {"4", "7"} and copies.keys() & {"5", "8"}
    assert cli.main(["score", "--audit", "--config", str(config)]) == 2
    assert "--overwrite" in capsys.readouterr().err

    tree |= PLAIN | {"run": tree["run"] | {"name": "without"}}
    tree["task"]["dataset"]["exclude"] = str(folder / "fixes.csv")
    assert len(go(tree).task) == 240 - len(fixes)
    del tree["task"]["dataset"]["exclude"]
    tree["run"]["name"] = "weighed"
    tree["task"]["dataset"] |= {
        "path": str(folder), "train_file": "audit.parquet", "id_column": "sample_id", "weight": "audit_weight",
        "dev_file": str(tmp_path / "data-classification" / "dev.jsonl"),
    }  # fmt: skip
    run = go(tree)
    weights = run.task.draw_weights()
    assert weights is not None and len(weights) == 240
    assert weights[sorted(wrong)].mean() < 0.3 < 0.8 < np.delete(weights, sorted(wrong)).mean()


def test_weights_of_ones_own_stay(tmp_path: Path, models_dir: Path) -> None:
    tree, _ = planted(tmp_path, models_dir, "weighed")
    path = tmp_path / "data-classification" / "train.jsonl"
    rows = [row | {"w": 1 + number % 3} for number, row in enumerate(read_lines(path))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree["task"]["dataset"]["weight"] = "w"
    table = pq.read_table(audit(parse_config(tree)).table)
    right = np.maximum(1 - table.column("audit_probability").to_numpy(), 1e-6)
    np.testing.assert_allclose(table.column("audit_weight").to_numpy(), right * [row["w"] for row in rows])


def test_adapters_judge_what_they_have_not_seen(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, wrong = planted(tmp_path, models_dir, "folds", scoring={"audit": "adapters", "folds": 3})
    trained: list[tuple[set[int], set[int]]] = []
    train_fold = cross_fit.train_fold

    def watched(run: Any, learned: Any, held_out: Any, *rest: Any, **named: Any) -> Any:
        trained.append((set(learned.tolist()), set(held_out.tolist())))
        return train_fold(run, learned, held_out, *rest, **named)

    monkeypatch.setattr(cross_fit, "train_fold", watched)
    result = audit(parse_config(tree))
    assert len(trained) == 3
    assert all(not learned & held_out and len(learned | held_out) == 240 for learned, held_out in trained)
    assert set.union(*(held_out for _, held_out in trained)) == set(range(240))
    table = pq.read_table(result.table)
    suspicion = table.column("audit_suspicion").to_numpy()
    assert len(set(np.argsort(-suspicion)[: len(wrong)].tolist()) & wrong) >= 0.6 * len(wrong)
    steps = read_lines(result.folder.parent / "metrics.jsonl")
    assert {line["fold"] for line in steps} == {f"fold {i} of 3" for i in (1, 2, 3)}


def test_an_audit_does_not_go_on_in_what_is_none(
    tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--resume`` leaves a run alone, and an audit that was finished, whose list of fixes may have been edited."""
    tree, _ = planted(tmp_path, models_dir, "run", **PLAIN)
    tree["train"]["max_steps"] = 3
    config = write_config(tmp_path / "config.yaml", tree)
    folder = go(tree).record.folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    resumed = ["score", "--audit", "--resume", "--config", str(config)]
    assert cli.main(resumed) == 2
    assert "so no audit that was killed" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert cli.main([*resumed, "run.name=audited"]) == 0, "of a folder that is not there it is a first life"
    fixes = tmp_path / "runs" / "audited" / "audit" / "fixes.csv"
    fixes.write_text("id\n1\n", encoding="utf-8")
    assert cli.main([*resumed, "run.name=audited"]) == 2
    assert fixes.read_text(encoding="utf-8") == "id\n1\n"
    (fixes.parent / "index.html").unlink()  # as one leaves it that was killed while it wrote
    assert cli.main([*resumed, "run.name=audited"]) == 0
    assert len(fixes.read_text(encoding="utf-8").splitlines()) > 2


@pytest.mark.parametrize("audit", ["features", "both"])
def test_a_request_to_stop_while_it_looks(
    audit: str, tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ends the pass; what has been seen is kept, and an audit that goes on is that of no pause."""
    tree, _ = planted(tmp_path, models_dir, "stopped", scoring={"audit": audit, "folds": 2})
    tree["train"] |= {"max_steps": 2, "eval_batch_size": 16}
    config = write_config(tmp_path / "config.yaml", tree)
    asked = ["score", "--audit", "--config", str(config)]
    assert cli.main([*asked, "run.name=whole"]) == 0
    seen: list[int] = []
    look_at = passes.StateLook.__call__

    def signalled(look: Any, module: Any, batch: Any) -> Any:
        seen.append(1)
        if len(seen) == 9:
            os.kill(os.getpid(), signal.SIGUSR1)
        return look_at(look, module, batch)

    monkeypatch.setattr(passes.StateLook, "__call__", signalled)
    defaults = ForwardPass.__init__.__kwdefaults__
    monkeypatch.setattr(ForwardPass.__init__, "__kwdefaults__", defaults | {"shard_size": 64})
    assert cli.main(asked) == 0
    assert "requeue: stopped on request" in capsys.readouterr().out
    assert len(seen) < 12
    assert cli.main([*asked, "--resume"]) == 0
    assert len(seen) < 2 * 15, "the shards that were kept are not seen again"
    whole, again = (
        pq.read_table(tmp_path / "runs" / name / "audit" / "audit.parquet") for name in ("whole", "stopped")
    )
    assert again.equals(whole)


def test_a_base_that_overflows_is_said(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree, _ = planted(tmp_path, models_dir, "broken")
    monkeypatch.setattr(passes.StateLook, "seen", lambda *_: torch.full((1, 4), torch.inf).expand(16, 4))
    tree["train"]["eval_batch_size"] = 16
    assert cli.main(["score", "--audit", "--config", str(write_config(tmp_path / "config.yaml", tree))]) == 2
    assert "the hidden states of the base are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["score", "--audit"], ["advise"]])
def test_what_takes_factors_out_of_the_base_is_said_before_it_is_loaded(
    command: list[str], tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree, _ = planted(tmp_path, models_dir, "pissa", **PLAIN)
    tree["adapter"]["init"] = "pissa"
    assert cli.main([*command, "--config", str(write_config(tmp_path / "config.yaml", tree))]) == 2
    said = capsys.readouterr().err
    assert "adapter.init='pissa': takes factors out of the base" in said and "set adapter.init=default" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_killed_audit_goes_on(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, _ = planted(tmp_path, models_dir, "killed", scoring={"audit": "both", "folds": 2})
    tree["train"]["max_steps"] = 4
    whole = pq.read_table(audit(parse_config(tree)).table)
    train_fold = cross_fit.train_fold
    names: list[str] = []

    def killed(*arguments: Any, name: str) -> Any:
        names.append(name)
        if name == "fold 2 of 2" and names.count(name) == 1:
            raise KeyboardInterrupt
        return train_fold(*arguments, name=name)

    monkeypatch.setattr(cross_fit, "train_fold", killed)
    with pytest.raises(KeyboardInterrupt):
        audit(parse_config(tree), overwrite=True)
    again = pq.read_table(audit(parse_config(tree), resume=True).table)
    assert names == ["fold 1 of 2", "fold 2 of 2", "fold 2 of 2"]
    assert again.equals(whole)
    assert not (tmp_path / "runs" / "killed" / "audit-parts").exists()


def test_numbers(tmp_path: Path, models_dir: Path) -> None:
    tree, _ = planted(tmp_path, models_dir, "numbers")
    path, rng = tmp_path / "data-classification" / "train.jsonl", random.Random(5)
    rows = read_lines(path)
    wrong = set(range(0, 240, 12))
    for row in rows:
        row["label"] = sum(word in FIELDS["film"] for word in row["text"].split()) + rng.random() / 4
    for i in wrong:
        rows[i]["label"] = 5 - rows[i]["label"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree["task"] = {key: value for key, value in tree["task"].items() if key not in ("labels", "metrics")}
    tree["task"] |= {"type": "regression", "dataset": tree["task"]["dataset"] | {"dev_file": None}}
    result = audit(parse_config(tree))
    suspicion = pq.read_table(result.table).column("audit_suspicion").to_numpy()
    assert len(set(np.argsort(-suspicion)[: len(wrong)].tolist()) & wrong) >= 0.7 * len(wrong)
    assert result.summary["classes"] == []


def test_answers_that_are_texts_are_ordered_by_loss(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("llama", tmp_path, models_dir, "texts", scoring={"folds": 2})
    tree["train"]["max_steps"] = 4
    result = audit(parse_config(tree))
    assert result.summary["share of wrong labels"] is None
    assert result.suspects[0]["probability"] is None
    table = pq.read_table(result.table)
    assert "audit_probability" not in table.column_names and "audit_weight" not in table.column_names
    assert table.column("summary").to_pylist()[0]
    assert "no probability" in result.page.read_text(encoding="utf-8")


def test_texts_with_several_answers_are_no_copies(tmp_path: Path, models_dir: Path) -> None:
    """Four of a source with answers of their own, and one row five times."""
    tree = run_tree("llama", tmp_path, models_dir, "answers", scoring={"folds": 2})
    tree["train"]["max_steps"] = 4
    path = tmp_path / "data-causal" / "train.jsonl"
    rows = read_lines(path)[:12]
    rows += [rows[0] | {"summary": word} for word in ("good", "bad", "fine")] + [rows[1]] * 4
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = audit(parse_config(tree))
    with result.fixes.open(encoding="utf-8", newline="") as file:
        copies = [row["id"] for row in csv.DictReader(file) if "copy of" in row["reason"]]
    assert len(copies) == 4
    assert set(copies) < {"1", "15", "16", "17", "18"}
    others = pq.read_table(result.table).column("audit_copies").to_pylist()
    assert others == [4 if i in (1, 15, 16, 17, 18) else 0 for i in range(19)]


@pytest.mark.parametrize("audit_by", ["adapters, of answers that are texts", "features", "both"])
def test_one_text_that_all_rows_have(tmp_path: Path, models_dir: Path, audit_by: str) -> None:
    """An instruction without an input, say: nothing tells rows apart but their answers, and every fold has some."""
    if audit_by in ("features", "both"):
        tree, _ = planted(tmp_path, models_dir, "same", scoring={"audit": audit_by, "folds": 2})
    else:
        tree = run_tree("llama", tmp_path, models_dir, "same", scoring={"folds": 2})
    tree["train"]["max_steps"] = 2
    path = tmp_path / f"data-{tree['task']['type']}" / "train.jsonl"
    rows = [row | {"text": "write a line", "source": "write a line"} for row in read_lines(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    table = pq.read_table(audit(parse_config(tree)).table)
    assert len(table) == len(rows)
    assert np.isfinite(table.column("audit_suspicion").to_numpy()).all()


@pytest.mark.parametrize("sources", ["features", "both"])
def test_rows_of_the_query_are_not_listed(tmp_path: Path, models_dir: Path, sources: str) -> None:
    """They are no rows of the pool's file, which the lists are taken back by."""
    tree, _ = planted(tmp_path, models_dir, "queried", scoring={"audit": sources, "folds": 2})
    tree["train"]["max_steps"] = 4
    data = tmp_path / "data-classification"
    rows = read_lines(data / "train.jsonl")
    rng = random.Random(9)
    query = [
        {"text": " ".join(rng.choices(FIELDS[truth], k=5) + rng.choices(WORDS[:9], k=3)), "label": truth}
        for truth in [*FIELDS] * 6
    ]
    query += [rows[33] | {"label": "sound"}, rows[36] | {"label": "text"}]  # copies of the pool's, labelled wrongly
    (data / "query.jsonl").write_text("".join(json.dumps(row) + "\n" for row in query), encoding="utf-8")
    tree["task"]["query"] = "query.jsonl"
    result = audit(parse_config(tree))
    table = pq.read_table(result.table)
    assert table.column("sample_id").to_pylist() == [str(i) for i in range(240)]
    assert result.summary["samples"] == 240
    with result.fixes.open(encoding="utf-8", newline="") as file:
        fixes = list(csv.DictReader(file))
    assert fixes and all(row["id"].isdigit() for row in fixes)
    assert "query-" not in result.page.read_text(encoding="utf-8")
    tree |= PLAIN | {"run": tree["run"] | {"name": "without"}}
    tree["task"]["dataset"]["exclude"] = str(result.fixes)
    assert len(go(tree).task) == 240 - len(fixes) + len(query)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.init_from=somewhere"], "adapter.init_from='somewhere'"),
        (["scoring.folds=1"], "scoring.folds"),
        (["--adapter", "somewhere"], "--adapter 'somewhere'"),
        (["--similarity", "2"], "--similarity 2"),
    ],
)
def test_what_cannot_be_audited(
    tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    config = write_config(tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "refused"))
    assert cli.main(["score", "--audit", "--config", str(config), *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
