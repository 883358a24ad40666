"""``launch/score.py``: a pool is scored alone, by a fresh warm-up or by a trained adapter."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from tests.runs import go, read_lines, run_tree, write_config
from tsqlora_scale.api import score
from tsqlora_scale.commands import main as cli
from tsqlora_scale.config.load import parse_config
from tsqlora_scale.quality import ScoreTable
from tsqlora_scale.quality.scores import score_table
from tsqlora_scale.quality.selectors.by_quality import QualitySelector


def copies(folder: Path) -> None:
    """Make the pool's rows 5 and 9 copies of row 2."""
    path = folder / "data-classification" / "train.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    rows[5] = rows[9] = rows[2]
    path.write_text("".join(rows))


def test_scoring_a_pool(tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = run_tree("bert", tmp_path, models_dir, "pool", scoring={"shard_size": 20})
    copies(tmp_path)
    config = write_config(tmp_path / "config.yaml", tree)
    assert cli.main(["score", "--config", str(config), "--top", "3", "--similarity", "0.99999"]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "runs" / "pool"
    table, ids = ScoreTable.read(folder / "scores")
    summary = json.loads((folder / "scores.json").read_text())
    assert (summary["scored"], summary["pool"], summary["warm-up steps"]) == (48, 48, 2)
    answers = np.array([row["label"] for row in read_lines(tmp_path / "data-classification" / "train.jsonl")])
    for title, sign in (("best", -1), ("worst", 1)):
        for label in ("yes", "no"):
            listed = [entry["sample_id"] for entry in summary[title] if entry["answer"] == label]
            of_label = np.flatnonzero(answers == label)
            order = of_label[np.argsort(sign * table.quality[of_label])]
            assert listed == [ids[i] for i in order[: len(listed)]]
            assert 1 <= len(listed) <= 2
    assert summary["worst"][0]["answer"] in ("yes", "no")
    assert summary["worst"][0]["text"] in (tmp_path / "data-classification" / "train.jsonl").read_text()
    planted = next(group for group in summary["similar"] if group["first"][0]["sample_id"] == "2")
    assert {entry["sample_id"] for entry in planted["first"]} >= {"2", "5", "9"}
    for word in ("48 of 48 samples scored", "best", "worst", "similar samples", "scores: "):
        assert word in out
    assert len(read_lines(folder / "metrics.jsonl")) == 2, "the warm-up's steps and no others"
    assert not (folder / "adapter").exists()

    assert cli.main(["score", "--config", str(config)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    parts = sorted((folder / "score-parts" / "pass-000").iterdir())
    assert len(parts) == 3
    before = (folder / "scores" / "pass-000.parquet").read_bytes()
    parts[-1].unlink()
    assert cli.main(["score", "--config", str(config), "--resume"]) == 0
    assert (folder / "scores" / "pass-000.parquet").read_bytes() == before


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_the_scores_open_as_one_table(
    suffix: str, tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pandas and datasets, file and folder, with ids, texts and labels as the data has them."""
    monkeypatch.setattr(score_table, "WITH_TEXTS", 20)  # several row groups
    tree = run_tree("bert", tmp_path, models_dir, "pool", scoring={"shard_size": 20})
    folder = tmp_path / "data-classification"
    rows = read_lines(folder / "train.jsonl")
    data = pd.DataFrame(
        {"key": [100 + i for i in range(len(rows))], "loss": [row["text"] for row in rows], "spare": 1.5,
         "label": [row["label"] for row in rows]}
    )  # fmt: skip
    data.to_csv(folder / "train.csv", index=False)
    data.to_json(folder / "train.jsonl", orient="records", lines=True)
    dev = pd.DataFrame(read_lines(folder / "dev.jsonl")).rename(columns={"text": "loss"})
    dev.to_csv(folder / "dev.csv", index=False)
    dev.to_json(folder / "dev.jsonl", orient="records", lines=True)
    tree["task"] |= {"text": ["loss"]}
    tree["task"]["dataset"] |= {"id_column": "key", "train_file": f"train.{suffix}", "dev_file": f"dev.{suffix}"}
    config = write_config(tmp_path / "config.yaml", tree)
    assert cli.main(["score", "--config", str(config)]) == 0
    file = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("scores: "))
    assert file.suffix == ".parquet"
    assert [path.name for path in file.parent.iterdir()] == [file.name], "nothing else that a reader would stumble over"
    table, ids = ScoreTable.read(file.parent)
    for found in (
        pd.read_parquet(file),
        pd.read_parquet(file.parent),
        datasets.load_dataset(str(file.parent), split="train", cache_dir=str(tmp_path / "cache")).to_pandas(),
    ):
        assert found["key"].tolist() == ids, "as text, which is what these readers read"
        assert found["sample_id"].tolist() == ids == [str(key) for key in data["key"]]
        assert found["data_loss"].tolist() == data["loss"].tolist(), "a column that is called as one of ours"
        assert found["label"].tolist() == data["label"].tolist()
        assert "spare" not in found
        np.testing.assert_array_equal(found["loss"], table.loss)
        np.testing.assert_array_equal(found["quality"], table.quality)


def test_scores_of_texts_hold_source_and_target(tmp_path: Path, models_dir: Path) -> None:
    tree = run_tree("llama", tmp_path, models_dir, "pool")
    result = score(parse_config(tree))
    rows = read_lines(tmp_path / "data-causal" / "train.jsonl")
    assert result.file is not None
    found = pd.read_parquet(result.file)
    assert found["text"].tolist() == [row["text"] for row in rows]
    assert found["summary"].tolist() == [row["summary"] for row in rows]
    assert found["sample_id"].tolist() == [str(i) for i in range(len(rows))]


FIELDS = {"film": ["film", "movie", "actor"], "sound": ["music", "with", "of"], "text": ["script", "story", "plot"]}


def test_suspects_are_errors_and_not_a_class(tmp_path: Path, models_dir: Path) -> None:
    """Three classes, one of them rare, a tenth of each one's labels wrong, early on in training."""
    tree = run_tree("bert", tmp_path, models_dir, "suspects")
    names, rng = list(FIELDS), random.Random(3)
    given = [name for name, count in zip(names, (100, 40, 140), strict=True) for _ in range(count)]
    wrong = {i for i in range(280) if i % 10 == 0}
    truth = [rng.choice([n for n in names if n != name]) if i in wrong else name for i, name in enumerate(given)]
    rows = [
        {"text": " ".join(rng.choices(FIELDS[name], k=5) + rng.choices(["the", "a", "is"], k=3)), "label": label}
        for name, label in zip(truth, given, strict=True)
    ]
    (tmp_path / "data-classification" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dev = [{"text": FIELDS[name][0], "label": name} for name in names]
    (tmp_path / "data-classification" / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dev))
    tree["task"]["labels"] = names
    tree["scoring"]["warmup_steps"] = 10
    tree["train"] |= {"max_steps": 11, "batch_size": 16, "micro_batch_size": 16}
    tree |= {"allocation": {"policy": "fixed"}}
    summary = score(parse_config(tree), top=28).summary
    suspects = summary["most against the others"]
    assert summary["ranked within"] == "labels"
    for name in names:
        share = 28 * given.count(name) / len(given)
        assert abs(sum(entry["answer"] == name for entry in suspects) - share) <= 1
    found = sum(int(entry["sample_id"]) in wrong for entry in suspects)
    table, _ = ScoreTable.read(tmp_path / "runs" / "suspects" / "scores")
    assert {given[i] for i in np.argsort(table.convergence)[:28]} == {"sound"}, "over the pool they are a class"
    assert found >= 20, "by chance there would be three"


BY_MOMENTS = [
    "task.query=q.jsonl",
    "sampling.selector=less",
    "sampling.keep_fraction=0.5",
    "sampling.less_gradients=adam",
]


def test_scoring_by_a_trained_adapter(tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = run_tree("deberta", tmp_path, models_dir, "trained", scoring={"refresh": "none"})
    run = go(tree)
    loss = run.evaluate()
    assert loss
    adapter = tmp_path / "runs" / "trained" / "adapter"
    tree["run"]["name"] = "scored"
    config = write_config(tmp_path / "config.yaml", tree)
    assert cli.main(["score", "--config", str(config), "--adapter", str(adapter)]) == 0
    table, _ = ScoreTable.read(tmp_path / "runs" / "scored" / "scores")
    assert isinstance(run.selector, QualitySelector)
    expected = run.selector.scorer.score(run.engine.module)
    np.testing.assert_allclose(table.loss, expected.loss, atol=1e-6)
    np.testing.assert_allclose(table.grad_norm, expected.grad_norm, rtol=1e-4)
    # scores of one adapter are not gone on with by another, or by none
    again = ["score", "--config", str(config), "--resume"]
    assert cli.main([*again, "--adapter", str(adapter)]) == 0
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    values = load_file(other / "adapter_model.safetensors")
    save_file({name: value * 2 for name, value in values.items()}, other / "adapter_model.safetensors")
    capsys.readouterr()
    for arguments, words in (([], "with an --adapter"), (["--adapter", str(other)], "with another --adapter")):
        assert cli.main([*again, *arguments]) == 2
        assert words in capsys.readouterr().err
    tree["run"]["name"], tree["adapter"]["alpha"] = "other", 9
    config = write_config(tmp_path / "config.yaml", tree)
    assert cli.main(["score", "--config", str(config), "--adapter", str(adapter)]) == 2
    assert "adapter.alpha" in capsys.readouterr().err


def test_an_adapter_is_not_overwritten_by_its_scores(
    tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its run's folder is that of the scores by the same config, and ``--overwrite`` empties it."""
    run = go(run_tree("bert", tmp_path, models_dir, "run"))
    folder = run.record.folder
    for adapter in (folder, folder / "adapter", next((folder / "checkpoints").iterdir())):
        command = ["score", "--config", str(folder / "config.yaml"), "--adapter", str(adapter), "--overwrite"]
        assert cli.main(command) == 2
        assert "lies in the run folder" in capsys.readouterr().err
        assert (folder / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.method=lora"], "nothing to score: sampling.selector is 'full'; set it to 'quality'"),
        (["adapter.method=dora"], "'dora' has no gradients by sample; set adapter.type=lora"),
        (["sampling.selector=full", "scoring.enabled=false"], "nothing"),
        (["--adapter", "x", *BY_MOMENTS], "the optimizer's moments, which no adapter's folder has"),
    ],
)
def test_nothing_to_score(
    tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    config = write_config(tmp_path / "config.yaml", run_tree("bert", tmp_path, models_dir, "pool"))
    assert cli.main(["score", "--config", str(config), *overrides]) == 2
    assert message in capsys.readouterr().err
