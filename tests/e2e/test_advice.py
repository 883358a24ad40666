"""``launch/advise.py``: planted pools get the right verdict, the choice is the selector's own, and nothing else is
written."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.queried import queried
from tests.runs import go, read_lines, run_tree, write_config
from tests.tiny import WORDS
from tsqlora_scale.advice import adapter_pilot, advice_run, pool_shares
from tsqlora_scale.advice.pool_sample import look_at_sample
from tsqlora_scale.advice.query_choice import PoolRatio, chosen_weights
from tsqlora_scale.api import advise
from tsqlora_scale.audit.trial_step import trial_step
from tsqlora_scale.commands import main as cli
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.run import preflight
from tsqlora_scale.run.build import build_run

#: Words of the wanted topic and of another, and those that decide the label of a text.
TOPIC, OTHER = ["film", "movie", "actor", "scene"], ["music", "script", "director", "story"]
GOOD, BAD = ["good", "great", "fine", "lovely"], ["bad", "awful", "dull", "boring"]


def texts(rng: random.Random, count: int, topic: list[str], *, turned: bool) -> list[dict[str, str]]:
    """Texts of a topic; ``turned``: what is good elsewhere is bad here."""
    rows = []
    for _ in range(count):
        is_good = rng.random() < 0.5
        words = rng.choices(topic, k=4) + rng.choices(GOOD if is_good else BAD, k=2) + rng.choices(WORDS[-8:-4], k=2)
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "label": "yes" if is_good != turned else "no", "summary": words[0]})
    return rows


def planted(kind: str, folder: Path, models: Path, *, on_target: int, size: int = 160, query: int = 40) -> Any:
    """A run with a query, of whose pool so many rows serve the query."""
    tree = queried(kind, folder, models)
    rng = random.Random(7)
    rows = texts(rng, on_target, TOPIC, turned=False) + texts(rng, size - on_target, OTHER, turned=True)
    rng.shuffle(rows)
    data = Path(tree["task"]["dataset"]["path"])
    for name, lines in (("train", rows), ("query", texts(rng, query, TOPIC, turned=False))):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return tree


def merged(tree: dict[str, Any], lines: dict[str, Any]) -> dict[str, Any]:
    """The tree with the keys that advice names."""
    return {
        name: merged(tree.get(name, {}) if isinstance(tree.get(name), dict) else {}, lines[name])
        if isinstance(lines.get(name), dict)
        else lines.get(name, tree.get(name))
        for name in [*tree, *(name for name in lines if name not in tree)]
    }


def test_a_mixed_pool_is_chosen_from(tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = planted("bert", tmp_path, models_dir, on_target=50)
    config = write_config(tmp_path / "config.yaml", tree)
    assert cli.main(["advise", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    for word in (
        "verdict: choose by the query",
        "selector: query",
        "off target",
        "trials by heads",
        "run's 4 steps",
    ):
        assert word in out
    run_dir = tmp_path / "runs" / "run"
    assert [path.relative_to(run_dir).as_posix() for path in sorted(run_dir.rglob("*"))] == [
        "advice",
        "advice/advice.json",
    ]
    found = json.loads((run_dir / "advice" / "advice.json").read_text(encoding="utf-8"))
    assert (found["verdict"], found["pool"], found["looked at"], found["query"]) == ("query", 160, 160, 40)
    low, high = found["shares"]["off target"]["between"]
    assert low <= 110 / 160 <= high
    assert found["trials"]["accuracy"]["query less even"][0] > 0
    assert found["expected gain over even draws"]["nats a row"][1] > 0
    go(merged(tree, found["config"]))
    assert (run_dir / "adapter").is_dir() and (run_dir / "advice" / "advice.json").exists(), "the run leaves it"
    kept = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.parent.name != "advice"}
    advise(parse_config(tree), rows=60)
    assert {path: path.read_bytes() for path in kept} == kept, "advice leaves the run"


def test_a_pool_that_is_all_on_target_is_drawn_from_evenly(tmp_path: Path, models_dir: Path) -> None:
    tree = planted("bert", tmp_path, models_dir, on_target=160)
    result = advise(parse_config(tree))
    assert result.verdict == "even"
    assert not result.summary["query against pool"]["evident"]
    alone = {"task": {"train_on_query": False}}  # nothing speaks for rows that are as the pool's are
    assert result.config == {**alone, "sampling": {"selector": "full", "keep_fraction": "auto"}}
    assert "even less pool alone" in result.summary["trials"]["accuracy"]
    less_pool = result.summary["trials"]["nats a row"]["even less pool alone"]
    assert result.summary["expected gain over even draws"]["nats a row"][0] == pytest.approx(-less_pool[0])
    again = advise(parse_config(tree))
    times = ("cost in seconds",)
    assert {k: v for k, v in again.summary.items() if k not in times} == {
        k: v for k, v in result.summary.items() if k not in times
    }


def test_a_useless_pool_is_left_alone(tmp_path: Path, models_dir: Path) -> None:
    """What is on no topic of its own, but labelled the other way round: it cannot be told from the query by texts."""
    tree = planted("bert", tmp_path, models_dir, on_target=160)
    path = Path(tree["task"]["dataset"]["path"]) / "train.jsonl"
    rows = [row | {"label": {"yes": "no", "no": "yes"}[row["label"]]} for row in read_lines(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = advise(parse_config(tree))
    assert result.verdict in ("query", "query alone")
    assert result.summary["trials"]["nats a row"]["query alone less even"][1] > 0
    assert parse_config(merged(tree, result.config)).sampling.selector == (
        "query" if result.verdict == "query" else "full"
    )


def test_without_a_query(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "plain")
    path = Path(tree["task"]["dataset"]["path"]) / "train.jsonl"
    rows = texts(random.Random(1), 120, TOPIC, turned=False)
    for row in rows[:36]:
        row["label"] = {"yes": "no", "no": "yes"}[row["label"]]
    rows += rows[36:60]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = advise(parse_config(tree))
    assert result.verdict == "even"
    shares = result.summary["shares"]
    low, high = shares["wrong labels"]["between"]
    assert low - 0.05 <= 36 / 144 <= high + 0.05
    assert shares["redundant rows"]["share"] >= 24 / 144 - 1e-3
    assert "off target" not in shares and "trials" not in result.summary
    assert "audit" in " ".join(result.reasons)


@pytest.mark.parametrize("compared", [10**6, 10])
def test_a_text_with_several_answers_is_not_redundant(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch, compared: int
) -> None:
    monkeypatch.setattr(pool_shares, "COMPARED", compared)
    tree = run_tree("bart", tmp_path, models_dir, "answers")
    path = Path(tree["task"]["dataset"]["path"]) / "train.jsonl"
    rows = read_lines(path)[:20]
    rows += [row | {"summary": f"{word} {row['summary']}"} for row in rows for word in ("good", "bad", "fine")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert advise(parse_config(tree)).summary["shares"]["redundant rows"]["share"] == 0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + rows[:20]), encoding="utf-8")
    tree["run"]["name"] = "copies"
    assert advise(parse_config(tree)).summary["shares"]["redundant rows"]["share"] == pytest.approx(0.2, abs=1e-4)


def test_the_choice_is_the_selectors_own(tmp_path: Path, models_dir: Path) -> None:
    tree = planted("bert", tmp_path, models_dir, on_target=50)
    tree["scoring"] = {"batch_size": 16, "max_length": 6}
    table = go(tree).selector.table
    assert table is not None
    config = parse_config(tree)
    run = build_run(preflight.check(config), writes=False)
    sample = look_at_sample(run, 2000)
    pool, query = sample.numbers[:160], sample.numbers[160:]
    ratio = PoolRatio.fit(sample.shape, pool, query, copies=sample.copies, seed=1, classes=2)
    assert ratio.standing.is_evident and ratio.standing.by_mixture
    assert 0.2 < ratio.standing.share < 0.45, "50 of 160"
    answers = sample.answers
    weights = chosen_weights(ratio, config.sampling, size=160, labels=answers[:160], wanted=answers[160:])
    np.testing.assert_array_equal(weights > 0, table.selected[:160])
    drawn = table.probability[:160] / table.probability[-1]  # of the query's own rows the weight is 1
    np.testing.assert_allclose(weights, drawn, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "bart", "gpt2"])
def test_adapters_are_tried(kind: str, tmp_path: Path, models_dir: Path) -> None:
    tree = queried(kind, tmp_path, models_dir)
    result = advise(parse_config(tree), pilot="adapters", steps=2)
    trials = result.summary["trials"]
    assert (trials["of"], trials["steps"], trials["judged on"]) == ("adapters", 2, 12)
    assert np.isfinite([trials["nats a row"][name] for name in trials["nats a row"]]).all()
    assert ("accuracy" in trials) == (kind == "bert")


@pytest.mark.parametrize("kind", ["regression", "llama"])
def test_other_answers(kind: str, tmp_path: Path, models_dir: Path) -> None:
    tree = planted("llama" if kind == "llama" else "bert", tmp_path, models_dir, on_target=50, query=80)
    if kind == "regression":
        for path in Path(tree["task"]["dataset"]["path"]).glob("*.jsonl"):
            rows = [row | {"label": float(row["label"] == "yes")} for row in read_lines(path)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tree["task"] |= {"type": "regression", "metrics": ["mse"]}
        del tree["task"]["labels"]
    result = advise(parse_config(tree))
    assert result.verdict == "query"
    assert ("trials" in result.summary) == (kind == "regression")
    assert (result.summary["shares"]["wrong labels"] is None) == (kind == "llama")
    assert ("accuracy" in (result.summary["expected gain over even draws"] or {})) is False


def test_numbers_that_are_all_alike_in_the_query(tmp_path: Path, models_dir: Path) -> None:
    """Differences are in units of the pool's and the query's spread together, not of a half of the query."""
    tree = planted("bert", tmp_path, models_dir, on_target=50, query=10)
    for path in Path(tree["task"]["dataset"]["path"]).glob("*.jsonl"):
        rows = [row | {"label": 5.0 if path.stem == "query" else float(row["label"] == "yes")} for row in read_lines(path)]  # noqa: E501  # fmt: skip
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree["task"] |= {"type": "regression", "metrics": ["mse"]}
    del tree["task"]["labels"]
    result = advise(parse_config(tree), pilot="adapters", steps=2)
    assert np.abs([*result.summary["trials"]["nats a row"].values()]).max() < 50


def test_a_part_of_the_pool_is_looked_at(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = planted("bert", tmp_path, models_dir, on_target=150, size=400)
    samples = []

    def watched(run: Any, count: int) -> Any:
        samples.append(look_at_sample(run, count))
        return samples[-1]

    monkeypatch.setattr(advice_run, "look_at_sample", watched)
    result = advise(parse_config(tree), rows=100)
    (sample,) = samples
    assert (sample.count, sample.size, len(sample.query)) == (100, 400, 40)
    assert sample.rows.max() < 400 and (np.diff(sample.rows) > 0).all()
    np.testing.assert_array_equal(sample.query, np.arange(400, 440))
    assert set(sample.weights[:100]) == {4.0} and set(sample.weights[100:]) == {1.0}
    assert result.summary["looked at"] == 100
    assert result.verdict == "query"
    assert "at least" in result.summary["shares"]["redundant rows"]["note"]


def test_a_query_that_is_not_trained_on(tmp_path: Path, models_dir: Path) -> None:
    tree = planted("bert", tmp_path, models_dir, on_target=50)
    tree["task"]["train_on_query"] = False
    result = advise(parse_config(tree))
    assert result.verdict == "query"
    tree["task"]["train_on_query"] = True
    trained = advise(parse_config(tree))
    name = "query less query alone"
    without, joined = (found.summary["trials"]["nats a row"][name][0] for found in (result, trained))
    assert without < joined, "what is chosen lacks the query's rows"
    accuracy = [found.summary["trials"]["accuracy"] for found in (result, trained)]
    assert accuracy[0]["query alone"] == accuracy[1]["query alone"]
    assert accuracy[0]["even"] == accuracy[1]["pool alone"] and "pool alone" not in accuracy[0]


def test_epochs_of_a_run_that_leaves_the_query_out(tmp_path: Path, models_dir: Path) -> None:
    """The length that is advised is that of the run that was asked about."""
    tree = planted("bert", tmp_path, models_dir, on_target=50)
    tree["task"]["train_on_query"] = False
    tree["train"] |= {"max_steps": None, "epochs": 2, "batch_size": 6}
    tree["sampling"] = {"selector": "full"}
    result = advise(parse_config(tree))
    assert result.summary["verdict"] != "even"
    assert result.config["train"] == {"epochs": None, "max_steps": 54}, "2 * 160 / 6, the query's 40 rows left out"
    assert result.summary["cost in seconds"]["steps"] == 54
    assert result.summary["trains on query"] is False
    tree["sampling"] = {"selector": "random", "keep_fraction": 0.3}
    assert advise(parse_config(tree)).config["train"]["max_steps"] == 16, "2 * 48 / 6"


def test_a_part_stands_for_all_without_replacement_too(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = planted("bert", tmp_path, models_dir, on_target=150, size=400)
    tree["sampling"] |= {"replacement": False, "selector": "full"}
    drawn: list[np.ndarray] = []

    def watched(run: Any, rows: np.ndarray, **more: Any) -> Any:
        drawn.append(np.asarray(rows))
        return trial_step(run, rows, **more)

    monkeypatch.setattr(adapter_pilot, "trial_step", watched)
    advise(parse_config(tree), rows=40, pilot="adapters", steps=8)
    of_query = [float((rows >= 400).mean()) for rows in np.array_split(np.concatenate(drawn), 8)]
    evenly = np.array(of_query)[[0, 4]]  # of each half the first way
    assert evenly.max() < 0.2, "of 400 rows and 20 of the query, and not of 40 and 20"


@pytest.mark.parametrize("pilot", ["heads", "adapters"])
def test_the_least_that_there_can_be(pilot: Any, tmp_path: Path, models_dir: Path) -> None:
    """Twenty rows, and ten of a query that has one class alone."""
    tree = planted("bert", tmp_path, models_dir, on_target=10, size=20, query=10)
    path = Path(tree["task"]["dataset"]["path"]) / "query.jsonl"
    rows = [row | {"label": "yes"} for row in read_lines(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = advise(parse_config(tree), rows=20, pilot=pilot, steps=1 if pilot == "adapters" else None)
    assert result.verdict in ("query", "query alone", "even")
    assert np.isfinite(list(result.summary["trials"]["nats a row"].values())).all()
