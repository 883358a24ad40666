"""Whole runs whose configs leave things to the data: classes, files in parts, several held-out sets, weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runs import go, losses_of, read_lines, result_of, run_tree, write_config
from tsqlora_scale import UserError, evaluate, export, load_config, score, train
from tsqlora_scale.commands.main import main
from tsqlora_scale.config.load import parse_config

SHORT: dict[str, Any] = {"max_steps": 9}


def short_tree(folder: Path, models: Path, name: str, **sections: Any) -> dict[str, Any]:
    tree = run_tree("bert", folder, models, name, train=SHORT | sections.pop("train", {}), **sections)
    tree["task"] |= {"labels": None, "metrics": None, "text": "text"}
    return tree


@pytest.fixture
def words(tmp_path: Path, models_dir: Path) -> dict[str, Any]:
    """A config as short as it can be: files alone, no classes, no metrics; two held-out sets."""
    tree = short_tree(tmp_path, models_dir, "run")
    folder = Path(tree["task"]["dataset"]["path"])
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    for number in range(3):
        (folder / f"part-{number}.jsonl").write_text("".join(lines[number * 16 : number * 16 + 16]))
    tree["task"]["dataset"] = {
        "train_file": str(folder / "part-*.jsonl"),
        "dev_file": {"first": str(folder / "dev.jsonl"), "other": [str(folder / "part-1.jsonl")]},
    }
    return tree


def test_a_config_that_leaves_the_rest_to_the_data(
    words: dict[str, Any], tmp_path: Path, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is that of the config which says it all; its own folder says it all, and works without the pool."""
    path = write_config(tmp_path / "c.yaml", words)
    assert main(["train", "--config", str(path), "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "- 'no'" in planned
    result = train(load_config(path, ["train.eval_every=4"]))
    whole = run_tree("bert", tmp_path, models_dir, "whole", train=SHORT)
    assert losses_of(result.folder) == losses_of(go(whole).record.folder)
    written = yaml.safe_load((result.folder / "config.yaml").read_text())["task"]
    assert (written["labels"], written["metrics"], written["text"]) == (["no", "yes"], ["accuracy"], ["text"])
    assert set(result.metrics) == {"first/accuracy", "other/accuracy"}
    assert result.record["best"]["metric"] == "first/accuracy"
    evaluated = [line["eval"] for line in read_lines(result.folder / "metrics.jsonl") if "eval" in line]
    assert [set(metrics) for metrics in evaluated] == [set(result.metrics)] * 4
    for part in (tmp_path / "data-classification").glob("part-[02].jsonl"):
        part.unlink()
    for config in (load_config(result.folder / "config.yaml"), load_config(path)):
        assert evaluate(config, result.adapter) == pytest.approx(result.metrics)
        export(result.adapter, "merged", tmp_path / "merged", config=config, overwrite=True)
        described = json.loads((tmp_path / "merged" / "config.json").read_text())
        assert described["id2label"] == {"0": "no", "1": "yes"}


def test_classes_that_the_data_gives_go_on(words: dict[str, Any], tmp_path: Path) -> None:
    """From a checkpoint, by the same config; other data with other classes are another run."""
    words["train"] |= {"checkpoint_every": 4, "checkpoint_keep": 9}
    run = go(words)
    losses = losses_of(run.record.folder)
    resumed = train(parse_config(words), resume=run.record.folder / "checkpoints" / "step-00000004")
    assert losses_of(resumed.folder) == losses
    part = tmp_path / "data-classification" / "part-2.jsonl"
    part.write_text(part.read_text().replace('"label": "yes"', '"label": "sure"'))
    with pytest.raises(UserError, match=r"was written with task.labels=\['no', 'yes'\], the config says .*'sure'"):
        train(parse_config(words), resume=run.record.folder / "checkpoints" / "step-00000004")


def test_scoring_with_classes_of_the_data(words: dict[str, Any]) -> None:
    words["task"]["dataset"].pop("dev_file")
    found = score(parse_config(words), top=1)
    assert found.summary["best"][0]["answer"] in ("no", "yes")


def test_evaluation_without_classes_or_run(words: dict[str, Any], tmp_path: Path) -> None:
    """An adapter that was copied out of its folder does not say which class is which."""
    run = go(words)
    copied = tmp_path / "elsewhere" / "deep" / "er" / "adapter"
    copied.parent.mkdir(parents=True)
    (run.record.folder / "adapter").rename(copied)
    with pytest.raises(UserError, match=r"task.labels is not set, .*config.yaml of the run folder"):
        evaluate(parse_config(words), copied)


class TestFedBack:
    """What a user has decided about samples: ``exclude`` and ``weight``."""

    def tree(self, folder: Path, models: Path, name: str, **dataset: Any) -> dict[str, Any]:
        tree = short_tree(folder, models, name, train={"checkpoint_every": 4, "checkpoint_keep": 9})
        pool = folder / "data-classification" / "train.jsonl"
        rows = [json.loads(line) for line in pool.read_text().splitlines()]
        for number, row in enumerate(rows):
            row["w"] = 0.5 + number % 5
        pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "out.txt").write_text("3\n17\n")
        tree["task"]["dataset"] |= dataset
        return tree

    def test_a_run_resumes_with_the_same_draws(self, tmp_path: Path, models_dir: Path) -> None:
        keys = {"weight": "w", "exclude": str(tmp_path / "out.txt")}
        tree = self.tree(tmp_path, models_dir, "run", **keys)
        run = go(tree)
        folder, losses = run.record.folder, losses_of(run.record.folder)
        assert result_of(folder)["pool_size"] == 46
        resumed = train(parse_config(tree), resume=folder / "checkpoints" / "step-00000004")
        assert losses_of(resumed.folder) == losses
        plain = go(self.tree(tmp_path, models_dir, "plain"))
        assert losses_of(plain.record.folder) != losses

    @pytest.mark.parametrize("change", ["weight", "exclude"])
    def test_other_decisions_are_another_run(self, tmp_path: Path, models_dir: Path, change: str) -> None:
        tree = self.tree(tmp_path, models_dir, "run", weight="w", exclude=str(tmp_path / "out.txt"))
        run = go(tree)
        if change == "weight":
            pool = tmp_path / "data-classification" / "train.jsonl"
            pool.write_text(pool.read_text().replace('"w": 1.5', '"w": 2.5'))
        else:
            (tmp_path / "out.txt").write_text("3\n18\n")
        with pytest.raises(UserError, match="was written with other training data"):
            train(parse_config(tree), resume=run.record.folder / "checkpoints" / "step-00000004")
